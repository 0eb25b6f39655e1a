//! The agent's kind of client: kube's watcher, which lists, watches and lists again after 410.

use std::time::Duration;

use futures::{StreamExt as _, pin_mut};
use hachi_apiserver::{Config, resource};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt as _,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use serde_json::json;

use crate::support;

/// Follows Pods and writes down what comes, until the other side has heard enough.
fn follow(api: Api<Pod>, config: watcher::Config) -> tokio::sync::mpsc::UnboundedReceiver<String> {
    let (send, receive) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let stream = watcher(api, config).default_backoff();
        pin_mut!(stream);
        while let Some(event) = stream.next().await {
            let line = match event {
                Ok(Event::Init) => "init".into(),
                Ok(Event::InitApply(pod)) => format!("has {}", pod.name_any()),
                Ok(Event::InitDone) => "done".into(),
                Ok(Event::Apply(pod)) => format!("apply {}", pod.name_any()),
                Ok(Event::Delete(pod)) => format!("delete {}", pod.name_any()),
                // The watcher reports 410 once, then lists again.
                Err(_) => continue,
            };
            if send.send(line).is_err() {
                return;
            }
        }
    });
    receive
}

async fn lines(
    stream: &mut tokio::sync::mpsc::UnboundedReceiver<String>,
    count: usize,
) -> Vec<String> {
    let mut lines = Vec::new();
    for _ in 0..count {
        let line = tokio::time::timeout(Duration::from_secs(20), stream.recv());
        lines.push(
            line.await
                .expect("an event in time")
                .expect("the watcher goes on"),
        );
    }
    lines
}

async fn lists_watches_and_lists_again(config: watcher::Config) {
    let server = support::start(Config::default());
    let client = support::admin(&server).await;
    let make = |name: &str| {
        let mut pod = support::pod(name, json!({"app": "web"}));
        // Nobody's to schedule, so that no change comes but those made here.
        pod["spec"]["schedulerName"] = json!("nobody");
        server.store.create(resource::PODS, pod).unwrap();
    };
    make("a");
    make("b");
    let mut stream = follow(Api::all(client), config);
    assert_eq!(
        lines(&mut stream, 4).await,
        ["init", "has a", "has b", "done"]
    );
    make("c");
    assert_eq!(lines(&mut stream, 1).await, ["apply c"]);
    server
        .store
        .delete(resource::PODS, "default", "a", None)
        .unwrap();
    assert_eq!(lines(&mut stream, 1).await, ["delete a"]);

    server.store.expire();
    assert_eq!(
        lines(&mut stream, 4).await,
        ["init", "has b", "has c", "done"]
    );
    make("d");
    assert_eq!(lines(&mut stream, 1).await, ["apply d"]);
}

#[tokio::test]
async fn with_lists() {
    lists_watches_and_lists_again(watcher::Config::default()).await;
}

#[tokio::test]
async fn with_lists_in_small_pages() {
    lists_watches_and_lists_again(watcher::Config::default().page_size(1)).await;
}

#[tokio::test]
async fn with_streaming_lists() {
    lists_watches_and_lists_again(watcher::Config::default().streaming_lists()).await;
}
