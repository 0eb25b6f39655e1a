//! How soon a watch tells of a change. A program of its own: what other tests do beside it would be
//! measured too.
#![forbid(unsafe_code)]

use std::{
    net::TcpListener,
    time::{Duration, Instant},
};

use futures::{AsyncBufReadExt as _, StreamExt as _, pin_mut};
use hachi_apiserver::{Config, Server, resource};
use kube::{
    Client,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};

#[tokio::test]
async fn a_policy_reaches_its_watchers_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port on loopback");
    let server = Server::start(Config {
        listeners: vec![listener],
        ..Config::default()
    })
    .expect("the server starts");
    let kubeconfig = Kubeconfig::from_yaml(&server.kubeconfig(server.addresses[0]));
    let kubeconfig = kubeconfig.expect("a kubeconfig");
    let options = KubeConfigOptions::default();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await;
    let client = Client::try_from(config.expect("a usable kubeconfig")).expect("a client");

    let path = "/apis/networking.k8s.io/v1/networkpolicies?watch=true";
    let request = http::Request::get(path).body(Vec::new()).unwrap();
    let stream = client.request_stream(request).await.expect("a watch");
    pin_mut!(stream);
    let mut lines = stream.lines();
    let mut taken = Vec::new();
    for place in 0..40 {
        let name = format!("p{place}");
        let policy = json!({
            "metadata": {"name": name, "namespace": "default"},
            "spec": {"podSelector": {}},
        });
        let start = Instant::now();
        server
            .store
            .create(resource::NETWORK_POLICIES, policy)
            .unwrap();
        let line = tokio::time::timeout(Duration::from_secs(10), lines.next()).await;
        let line = line.expect("an event in time").expect("an event").unwrap();
        let event: Value = serde_json::from_str(&line).expect("a line of JSON");
        taken.push(start.elapsed());
        assert_eq!(event["object"]["metadata"]["name"], name.as_str());
    }
    taken.sort();
    // About a millisecond on an idle machine; the bound leaves room for a busy one and still
    // tells a wake-up from a poll.
    assert!(
        taken[20] < Duration::from_millis(25),
        "median {:?}",
        taken[20]
    );
}
