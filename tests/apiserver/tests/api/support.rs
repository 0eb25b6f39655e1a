//! What the suites share: a server on loopback, a client of it, and objects to feed it.

use std::{
    net::TcpListener,
    time::{Duration, Instant},
};

use hachi_apiserver::{Config, Handle, Server};
use kube::{
    Client,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};

/// Starts a server on a free port of the loopback.
pub(crate) fn start(config: Config) -> Handle {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port on loopback");
    Server::start(Config {
        listeners: vec![listener],
        ..config
    })
    .expect("the server starts")
}

/// A client with a kubeconfig.
pub(crate) async fn client(kubeconfig: &str) -> Client {
    let kubeconfig = Kubeconfig::from_yaml(kubeconfig).expect("a kubeconfig");
    let options = KubeConfigOptions::default();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await;
    Client::try_from(config.expect("a usable kubeconfig")).expect("a client")
}

/// The administrator's client of a server.
pub(crate) async fn admin(server: &Handle) -> Client {
    client(&server.kubeconfig(server.addresses[0])).await
}

/// A Pod in the default namespace.
pub(crate) fn pod(name: &str, labels: Value) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "default", "labels": labels},
        "spec": {"containers": [{
            "name": "c",
            "image": "i",
            "ports": [{"name": "http", "containerPort": 8080}],
        }]},
    })
}

/// Looks until a condition holds, at most ten seconds.
pub(crate) fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "still not so: {what}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}
