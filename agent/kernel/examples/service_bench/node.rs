//! A node of Hachi: index, compiler and maps, and two Pods of its own among many.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use hachi_compile::{Compiler, Draining, Image, Limits, Op, Retired, diff};
use hachi_index::{Index, Object};
use hachi_kernel::{Capacities, Datapath, LoadOptions};
use serde_json::{Value, json};

use crate::{
    cluster::{self, NODES, Size},
    support::World,
};

/// Pods that the Services' endpoints are.
pub(crate) const PODS: usize = 10_000;
/// The Service that is asked; its one endpoint is the server.
pub(crate) const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 95, 0, 1);
/// Its port.
pub(crate) const TARGET: u16 = 80;
/// The server's port.
pub(crate) const PORT: u16 = 8_080;
/// The first Pod of this node.
pub(crate) const SERVER_IP: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 0);
/// The second.
pub(crate) const CLIENT_IP: Ipv4Addr = Ipv4Addr::new(10, 1, 0, NODES as u8);

pub(crate) struct Node {
    index: Index,
    compiler: Compiler,
    image: Image,
    draining: Draining,
    pub(crate) datapath: Datapath,
    /// The host's side of the interfaces of the server and the client.
    pub(crate) interfaces: [u32; 2],
}

impl Node {
    pub(crate) fn new(world: &World) -> Self {
        Self::named(world, ["server", "client"])
    }

    /// With interfaces of these names.
    pub(crate) fn named(world: &World, names: [&str; 2]) -> Self {
        let options = LoadOptions {
            capacities: Capacities::default(),
            ..world.options()
        };
        Self {
            index: Index::new("n0"),
            compiler: Compiler::default(),
            image: Image::default(),
            draining: Draining::new(),
            datapath: Datapath::load(&options).expect("the datapath loads"),
            interfaces: names.map(|name| world.veth(name)),
        }
    }

    /// Takes in this many Services, that which is asked among them, and both Pods; returns how long the
    /// index took for the Services.
    pub(crate) fn fill(&mut self, services: usize) -> Duration {
        let size = Size {
            pods: 2 * NODES,
            policies: 0,
            services: 0,
        };
        for value in size.objects() {
            self.index.apply(cluster::object(value));
        }
        for (at, mut endpoint) in size.endpoints().take(2).enumerate() {
            endpoint.ifindex = self.interfaces[at];
            self.index.add_endpoint(endpoint);
        }
        let mut took = Duration::ZERO;
        let others = (1..services).flat_map(|n| cluster::service(n, PODS, true));
        for value in others.chain(asked()) {
            let object = cluster::object(value);
            let start = Instant::now();
            self.index.apply(object);
            took += start.elapsed();
        }
        took
    }

    /// Takes in an event as the watch does.
    pub(crate) fn event(&mut self, bytes: &[u8]) {
        let value: Value = serde_json::from_slice(bytes).expect("JSON");
        let object = match value["kind"].as_str() {
            Some("EndpointSlice") => {
                Object::EndpointSlice(serde_json::from_slice(bytes).expect("an EndpointSlice"))
            }
            _ => cluster::object(value),
        };
        self.index.apply(object);
    }

    /// Brings the kernel's maps up to date, as the agent does; returns the writes.
    pub(crate) fn sync(&mut self) -> usize {
        let compiled = self
            .compiler
            .compile_within(self.index.desired(), &Limits::NONE);
        assert!(compiled.problems.is_empty(), "{:?}", compiled.problems);
        let mut ops = diff(&self.image, &compiled.image);
        if self.datapath.revision().expect("a revision") == 0 {
            ops.push(Op::RaiseRevision);
        }
        self.datapath.apply(&ops).expect("the writes");
        let (old, new) = (
            (&self.image, &self.draining),
            (&compiled.image, &compiled.draining),
        );
        let retired = Retired::between(old, new, self.compiler.touched());
        assert!(retired.is_empty(), "nothing here is of UDP");
        self.image = compiled.image;
        self.draining = compiled.draining;
        ops.len()
    }
}

/// The Service that is asked, and its slice.
fn asked() -> [Value; 2] {
    let meta = |name: &str| json!({"namespace": "default", "name": name});
    let mut labelled = meta("asked-x");
    labelled["labels"] = json!({"kubernetes.io/service-name": "asked"});
    [
        json!({"kind": "Service", "metadata": meta("asked"),
            "spec": {"clusterIP": SERVICE.to_string(),
                     "ports": [{"name": "http", "port": TARGET}]}}),
        json!({"kind": "EndpointSlice", "addressType": "IPv4", "metadata": labelled,
            "ports": [{"name": "http", "port": PORT}],
            "endpoints": [{"addresses": [SERVER_IP.to_string()], "conditions": {"ready": true}}]}),
    ]
}
