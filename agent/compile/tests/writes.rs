//! What an event writes is a matter of what changes, not of how large the cluster is.

#[path = "../examples/cluster/mod.rs"]
mod cluster;

use cluster::{APPS, NAMESPACE_SIZE, NODES, Size, app_of, object};
use hachi_compile::{Compiler, Image, Op, diff};
use hachi_index::Index;

struct Node {
    index: Index,
    compiler: Compiler,
    image: Image,
}

impl Node {
    fn new(size: Size) -> Self {
        let mut node = Self {
            index: size.index(),
            compiler: Compiler::default(),
            image: Image::default(),
        };
        node.writes();
        node
    }

    /// The writes that bring the maps up to date.
    fn writes(&mut self) -> Vec<Op> {
        let compiled = self.compiler.compile(self.index.desired());
        let ops = diff(&self.image, &compiled.image);
        self.image = compiled.image;
        ops
    }

    fn relabel(&mut self, pod: usize, app: usize) -> Vec<Op> {
        self.index.apply(object(cluster::pod(pod, app)));
        self.writes()
    }
}

#[test]
fn a_label_of_a_pod_is_not_written_for_the_whole_cluster() {
    let of = |namespaces: usize| Size {
        pods: namespaces * NAMESPACE_SIZE,
        policies: namespaces * APPS,
        services: 0,
    };
    for namespaces in [50, 75] {
        let mut node = Node::new(of(namespaces));
        let peers = |ops: &[Op]| {
            let of_peers = |op: &&Op| matches!(op, Op::PutPeer(..) | Op::DeletePeer(..));
            ops.iter().filter(of_peers).count()
        };
        // Of this node: other policies select it, whose rules ask for other labels of its namespace.
        let alike = NAMESPACE_SIZE / APPS;
        for round in (1..APPS).step_by(4) {
            let local = node.relabel(0, (app_of(0) + round) % APPS);
            assert!(
                peers(&local) <= 4 * alike,
                "{namespaces}: {}",
                peers(&local)
            );
            let sets = 2 * of(namespaces).pods / NODES;
            assert!(local.len() <= 30 * sets, "{namespaces}: {}", local.len());
        }
        // Of another node: a Pod more or less of a class.
        let remote = node.relabel(1, (app_of(1) + 1) % APPS);
        assert!(peers(&remote) <= 1, "{namespaces}: {remote:?}");
    }
}
