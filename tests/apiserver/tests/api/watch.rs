//! Lists and watches as they are on the wire.

use std::time::{Duration, Instant};

use hachi_apiserver::{Config, Grant, Handle, Rule, Since, resource};
use http_body_util::BodyExt as _;
use kube::{Client, client::Body};
use serde_json::{Value, json};

use crate::support;

/// The lines of a watch.
struct Lines {
    body: Body,
    rest: Vec<u8>,
}

impl Lines {
    /// The next event; `None` at the end.
    async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).expect("a line of JSON"));
            }
            let frame = tokio::time::timeout(Duration::from_secs(10), self.body.frame());
            let frame = frame.await.expect("an event in time")?;
            self.rest
                .extend(frame.expect("a frame").into_data().unwrap_or_default());
        }
    }

    /// Type, name and version of the next event.
    async fn brief(&mut self) -> (String, String, u64) {
        let event = self.next().await.expect("an event");
        let metadata = &event["object"]["metadata"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        (
            text(&event["type"]),
            text(&metadata["name"]),
            version(&event["object"]),
        )
    }
}

fn version(object: &Value) -> u64 {
    object["metadata"]["resourceVersion"]
        .as_str()
        .unwrap_or_default()
        .parse()
        .unwrap_or(0)
}

async fn send(client: &Client, request: http::Request<Vec<u8>>) -> (u16, Body) {
    let response = client
        .send(request.map(Body::from))
        .await
        .expect("a response");
    (response.status().as_u16(), response.into_body())
}

async fn get(client: &Client, path: &str) -> (u16, Value) {
    let (code, body) = send(client, http::Request::get(path).body(Vec::new()).unwrap()).await;
    let bytes = body.collect().await.expect("a body").to_bytes();
    (code, serde_json::from_slice(&bytes).expect("JSON"))
}

async fn watch(client: &Client, path: &str) -> Lines {
    let (code, body) = send(client, http::Request::get(path).body(Vec::new()).unwrap()).await;
    assert_eq!(code, 200, "{path}");
    Lines {
        body,
        rest: Vec::new(),
    }
}

fn config_map(name: &str, labels: Value) -> Value {
    json!({"metadata": {"name": name, "namespace": "default", "labels": labels}})
}

fn make(server: &Handle, name: &str) -> u64 {
    let maps = resource::find("", "v1", "configmaps").unwrap();
    server
        .store
        .create(maps, config_map(name, json!({})))
        .unwrap()
        .version()
}

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

#[tokio::test]
async fn a_watch_resumes_after_the_version_that_it_names() {
    let server = support::start(Config::default());
    let client = support::admin(&server).await;
    let versions = ["a", "b", "c"].map(|name| make(&server, name));
    let path = format!("{MAPS}?watch=true&resourceVersion={}", versions[0]);
    let mut lines = watch(&client, &path).await;
    assert_eq!(
        lines.brief().await,
        ("ADDED".into(), "b".into(), versions[1])
    );
    assert_eq!(
        lines.brief().await,
        ("ADDED".into(), "c".into(), versions[2])
    );
    let maps = resource::find("", "v1", "configmaps").unwrap();
    let gone = server
        .store
        .delete(maps, "default", "a", None)
        .unwrap()
        .version();
    assert_eq!(lines.brief().await, ("DELETED".into(), "a".into(), gone));
    // Without a version, what exists comes first.
    let mut lines = watch(&client, &format!("{MAPS}?watch=true")).await;
    assert_eq!(
        lines.brief().await,
        ("ADDED".into(), "b".into(), versions[1])
    );
}

#[tokio::test]
async fn an_expired_version_is_gone_before_and_within_a_watch() {
    let server = support::start(Config::default());
    let client = support::admin(&server).await;
    let version = make(&server, "a");
    let path = format!("{MAPS}?watch=true&resourceVersion={version}");
    let mut lines = watch(&client, &path).await;
    let (_, page) = get(&client, "/api/v1/namespaces?limit=1").await;
    let token = page["metadata"]["continue"].as_str().unwrap().to_owned();

    let expire = http::Request::post("/-/expire").body(Vec::new()).unwrap();
    assert_eq!(send(&client, expire).await.0, 200);
    let event = lines.next().await.unwrap();
    assert_eq!(
        (&event["type"], &event["object"]["code"]),
        (&json!("ERROR"), &json!(410))
    );
    assert_eq!(lines.next().await, None);
    // A new watch from there is answered, and told the same.
    let mut lines = watch(&client, &path).await;
    let event = lines.next().await.unwrap();
    assert_eq!(
        (&event["type"], &event["object"]["reason"]),
        (&json!("ERROR"), &json!("Expired"))
    );
    assert_eq!(lines.next().await, None);
    let (code, _) = get(
        &client,
        &format!("/api/v1/namespaces?limit=1&continue={token}"),
    )
    .await;
    assert_eq!(code, 410);

    let (_, list) = get(&client, MAPS).await;
    let path = format!("{MAPS}?watch=true&resourceVersion={}", version_of(&list));
    let mut lines = watch(&client, &path).await;
    make(&server, "b");
    assert_eq!(lines.brief().await.1, "b");
}

fn version_of(list: &Value) -> &str {
    list["metadata"]["resourceVersion"].as_str().unwrap()
}

#[tokio::test]
async fn a_short_history_forgets_and_says_so() {
    let server = support::start(Config {
        history: 2,
        ..Config::default()
    });
    let client = support::admin(&server).await;
    let versions = ["a", "b", "c", "d"].map(|name| make(&server, name));
    for (version, forgotten) in [
        (versions[0], true),
        (versions[1], false),
        (versions[3], false),
    ] {
        let path = format!("{MAPS}?watch=true&timeoutSeconds=0&resourceVersion={version}");
        let first = watch(&client, &path).await.next().await;
        let gone = first.is_some_and(|event| event["object"]["code"] == 410);
        assert_eq!(gone, forgotten, "{version}");
    }
    // kube's client tries again by itself after the 504 of a version that is yet to come.
    let maps = resource::find("", "v1", "configmaps").unwrap();
    let failure = server
        .store
        .watch(maps, Since::Version(versions[3] + 100))
        .unwrap_err();
    assert_eq!(
        (failure.code, failure.causes[0].reason),
        (504, "ResourceVersionTooLarge")
    );
    // Versions of a server before this one are too old, whatever it had reached.
    let before = server.store.version() - 1_000;
    assert_eq!(
        server
            .store
            .watch(maps, Since::Version(before))
            .unwrap_err()
            .code,
        410
    );
}

#[tokio::test]
async fn bookmarks_tell_how_far_the_watch_is() {
    let bookmarks = Duration::from_millis(30);
    let server = support::start(Config {
        bookmarks,
        ..Config::default()
    });
    let client = support::admin(&server).await;
    let version = make(&server, "a");
    let path = format!("{MAPS}?watch=true&allowWatchBookmarks=true&resourceVersion={version}");
    let mut lines = watch(&client, &path).await;
    // A change of another kind: only a bookmark can tell of its version.
    let pods = support::pod("p", json!({}));
    let version = server.store.create(resource::PODS, pods).unwrap().version();
    let told = loop {
        let (kind, name, told) = lines.brief().await;
        assert_eq!((kind.as_str(), name.as_str()), ("BOOKMARK", ""));
        if told >= version {
            break told;
        }
    };
    make(&server, "b");
    let mut lines = watch(
        &client,
        &format!("{MAPS}?watch=true&resourceVersion={told}"),
    )
    .await;
    assert_eq!(lines.brief().await.1, "b");
}

#[tokio::test]
async fn initial_events_end_with_a_marked_bookmark() {
    let server = support::start(Config::default());
    let client = support::admin(&server).await;
    make(&server, "a");
    let path = format!(
        "{MAPS}?watch=true&allowWatchBookmarks=true&sendInitialEvents=true\
         &resourceVersionMatch=NotOlderThan"
    );
    let mut lines = watch(&client, &path).await;
    assert_eq!(lines.brief().await.1, "a");
    let mark = lines.next().await.unwrap();
    assert_eq!(mark["type"], "BOOKMARK");
    let annotations = &mark["object"]["metadata"]["annotations"];
    assert_eq!(annotations["k8s.io/initial-events-end"], "true");
}

#[tokio::test]
async fn initial_events_are_complete_however_little_time_there_is() {
    let server = support::start(Config::default());
    let client = support::admin(&server).await;
    make(&server, "a");
    let path = format!(
        "{MAPS}?watch=true&allowWatchBookmarks=true&sendInitialEvents=true\
         &resourceVersionMatch=NotOlderThan&timeoutSeconds=0"
    );
    let mut lines = watch(&client, &path).await;
    assert_eq!(lines.brief().await.1, "a");
    assert_eq!(lines.next().await.unwrap()["type"], "BOOKMARK");
    assert_eq!(lines.next().await, None);
}

#[tokio::test]
async fn a_watch_ends_when_its_time_is_up() {
    let server = support::start(Config::default());
    let client = support::admin(&server).await;
    let start = Instant::now();
    let path = format!("{MAPS}?watch=true&timeoutSeconds=1");
    let mut lines = watch(&client, &path).await;
    assert_eq!(lines.next().await, None);
    let taken = start.elapsed();
    assert!(taken >= Duration::from_millis(900), "{taken:?}");
}

#[tokio::test]
async fn a_selector_sees_objects_come_and_go() {
    let server = support::start(Config::default());
    let client = support::admin(&server).await;
    let maps = resource::find("", "v1", "configmaps").unwrap();
    let path = format!("{MAPS}?watch=true&labelSelector=app%3Dweb");
    let mut lines = watch(&client, &path).await;
    server
        .store
        .create(maps, config_map("a", json!({"app": "db"})))
        .unwrap();
    let label = |value: &str| {
        let change = |map: &mut Value| map["metadata"]["labels"]["app"] = json!(value);
        server.store.modify(maps, "default", "a", change).unwrap();
    };
    label("web");
    label("web");
    let other = |map: &mut Value| map["data"] = json!({"k": "v"});
    server.store.modify(maps, "default", "a", other).unwrap();
    label("db");
    server.store.delete(maps, "default", "a", None).unwrap();
    server
        .store
        .create(maps, config_map("b", json!({"app": "web"})))
        .unwrap();
    let mut seen = Vec::new();
    for _ in 0..4 {
        let (kind, name, _) = lines.brief().await;
        seen.push(format!("{kind} {name}"));
    }
    assert_eq!(seen, ["ADDED a", "MODIFIED a", "DELETED a", "ADDED b"]);
}

#[tokio::test]
async fn concurrent_writes_reach_every_watch_once_and_in_order() {
    const WRITERS: usize = 4;
    const OBJECTS: usize = 100;
    let server = support::start(Config::default());
    let client = support::admin(&server).await;
    let version = server.store.version();
    let path = format!("{MAPS}?watch=true&resourceVersion={version}");
    let mut watches = Vec::new();
    for _ in 0..3 {
        let mut lines = watch(&client, &path).await;
        watches.push(tokio::spawn(async move {
            let mut seen = Vec::new();
            for _ in 0..WRITERS * OBJECTS * 3 {
                seen.push(lines.brief().await);
            }
            seen
        }));
    }
    for writer in 0..WRITERS {
        let store = server.store.clone();
        std::thread::spawn(move || {
            let maps = resource::find("", "v1", "configmaps").unwrap();
            for place in 0..OBJECTS {
                let name = format!("{writer}-{place}");
                store.create(maps, config_map(&name, json!({}))).unwrap();
                let change = |map: &mut Value| map["data"] = json!({"k": "v"});
                store.modify(maps, "default", &name, change).unwrap();
                store.delete(maps, "default", &name, None).unwrap();
            }
        });
    }
    for watch in watches {
        let seen = watch.await.unwrap();
        assert!(seen.is_sorted_by(|one, two| one.2 < two.2), "versions rise");
        for writer in 0..WRITERS {
            for place in 0..OBJECTS {
                let name = format!("{writer}-{place}");
                let kinds = seen.iter().filter(|event| event.1 == name);
                let kinds: Vec<_> = kinds.map(|event| event.0.as_str()).collect();
                assert_eq!(kinds, ["ADDED", "MODIFIED", "DELETED"], "{name}");
            }
        }
    }
}

#[tokio::test]
async fn lists_come_in_pages() {
    let server = support::start(Config::default());
    let client = support::admin(&server).await;
    for place in 0..5 {
        make(&server, &format!("m{place}"));
    }
    let (mut names, mut token, mut pages) = (Vec::new(), String::new(), 0);
    loop {
        let (code, page) = get(&client, &format!("{MAPS}?limit=2&continue={token}")).await;
        assert_eq!((code, &page["kind"]), (200, &json!("ConfigMapList")));
        let items = page["items"].as_array().unwrap().iter();
        names.extend(items.map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()));
        pages += 1;
        match page["metadata"]["continue"].as_str() {
            Some(next) => token = next.to_owned(),
            None => break,
        }
    }
    assert_eq!((names.join(" ").as_str(), pages), ("m0 m1 m2 m3 m4", 3));
    let (code, _) = get(&client, &format!("{MAPS}?continue=nonsense")).await;
    assert_eq!(code, 400);
    let (_, list) = get(&client, &format!("{MAPS}?fieldSelector=metadata.name%3Dm3")).await;
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn tokens_say_who_may_do_what() {
    let rule = |resources: &[&str], verbs: &[&str]| Rule {
        groups: vec![String::new()],
        resources: resources.iter().map(ToString::to_string).collect(),
        verbs: verbs.iter().map(ToString::to_string).collect(),
    };
    let grant = Grant {
        token: "agent-token".into(),
        user: "agent".into(),
        rules: vec![
            rule(&["configmaps"], &["get", "list"]),
            rule(&["pods"], &["*"]),
        ],
    };
    let server = support::start(Config {
        grants: vec![grant.clone()],
        ..Config::default()
    });
    let address = server.addresses[0];
    let agent = support::client(&server.kubeconfig_for(address, &grant)).await;
    let stranger = Grant {
        token: "other".into(),
        ..grant
    };
    let stranger = support::client(&server.kubeconfig_for(address, &stranger)).await;
    for (client, path, code) in [
        (&agent, MAPS.to_owned(), 200),
        (&agent, format!("{MAPS}?watch=true&timeoutSeconds=0"), 403),
        (&agent, "/api/v1/nodes".to_owned(), 403),
        (&agent, "/api/v1/pods".to_owned(), 200),
        (
            &agent,
            "/apis/networking.k8s.io/v1/networkpolicies".to_owned(),
            403,
        ),
        (&agent, "/api/v1".to_owned(), 200),
        (&stranger, MAPS.to_owned(), 401),
        (&stranger, "/version".to_owned(), 401),
    ] {
        assert_eq!(get(client, &path).await.0, code, "{path}");
    }
}

#[tokio::test]
async fn ten_thousand_pods_and_services_are_listed() {
    const COUNT: usize = 10_000;
    let server = support::start(Config::default());
    let client = support::admin(&server).await;
    let store = server.store.clone();
    for place in 0..COUNT {
        let app = json!({"app": format!("a{place}")});
        let spec = json!({"selector": app, "ports": [{"port": 80}]});
        let name = format!("s{place}");
        let service = json!({"metadata": {"name": name, "namespace": "default"}, "spec": spec});
        store.create(resource::SERVICES, service).unwrap();
        store
            .create(resource::PODS, support::pod(&format!("p{place}"), app))
            .unwrap();
    }
    for kind in ["pods", "services"] {
        let (code, list) = get(&client, &format!("/api/v1/namespaces/default/{kind}")).await;
        let count = list["items"].as_array().unwrap().len();
        assert!(code == 200 && count >= COUNT, "{kind}: {count}");
    }
}
