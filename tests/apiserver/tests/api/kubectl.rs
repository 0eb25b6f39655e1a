//! The real kubectl against the server.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use hachi_apiserver::{
    Config, Handle,
    resource::{NAMESPACES, NETWORK_POLICIES, PODS, SERVICES},
};
use hachi_testutil::skip;
use serde_json::{Value, json};

use crate::support::{self, eventually};

/// kubectl with a home of its own, so that no cache or setting of the machine plays a part.
struct Kubectl {
    server: Handle,
    home: tempfile::TempDir,
}

impl Kubectl {
    /// `None` where there is no kubectl.
    fn new() -> Option<Self> {
        let found = Command::new("kubectl")
            .args(["version", "--client"])
            .output();
        if !found.is_ok_and(|output| output.status.success()) {
            return None;
        }
        let server = support::start(Config::default());
        let home = tempfile::tempdir().unwrap();
        server
            .write_kubeconfig(server.addresses[0], &home.path().join("config"))
            .unwrap();
        Some(Self { server, home })
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.home.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["30", "kubectl"])
            .args(arguments.split(' '))
            .env("KUBECONFIG", self.home.path().join("config"))
            .env("HOME", self.home.path())
            .stdin(Stdio::null());
        command
    }

    fn output(&self, arguments: &str) -> (bool, String) {
        let Output {
            status,
            stdout,
            stderr,
        } = self.command(arguments).output().unwrap();
        let text = [stdout, stderr].concat();
        (
            status.success(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    }

    /// Runs it, and expects it to go well.
    #[track_caller]
    fn run(&self, arguments: &str) -> String {
        let (good, text) = self.output(arguments);
        assert!(good, "kubectl {arguments}: {text}");
        text
    }

    /// Runs it with `-f` of a file.
    #[track_caller]
    fn run_file(&self, arguments: &str, file: &Path) -> String {
        self.run(&format!("{arguments} -f {}", file.display()))
    }
}

macro_rules! kubectl {
    () => {
        match Kubectl::new() {
            Some(kubectl) => kubectl,
            None => skip!("no kubectl"),
        }
    };
}

const WEB: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec:
  containers:
  - name: server
    image: nginx
    resources: {limits: {cpu: 1, memory: 64Mi}}
    ports:
    - {name: http, containerPort: 80}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports:
  - {port: 80, targetPort: http}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: allow-web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
  ingress:
  - from:
    - podSelector: {matchLabels: {role: client}}
    ports:
    - {protocol: TCP, port: 80}
";

#[test]
fn apply_change_and_delete() {
    let kubectl = kubectl!();
    let store = &kubectl.server.store;
    let file = kubectl.file("web.yaml", WEB);
    assert_eq!(
        kubectl.run_file("apply", &file).matches(" created").count(),
        4
    );
    // The Pod's `cpu: 1` is stored as text, which kubectl takes for a difference.
    let told = kubectl.run_file("apply", &file);
    assert_eq!(told.matches(" unchanged").count(), 3);
    let pod = store.get(PODS, "shop", "web-1").unwrap();
    assert_eq!(pod["metadata"]["generation"], 1);
    assert_eq!(
        pod["spec"]["containers"][0]["resources"]["limits"]["cpu"],
        "1"
    );
    let address = store.get(SERVICES, "shop", "web").unwrap()["spec"]["clusterIP"].clone();

    // A rule and a label go, a port changes; what the server filled in stays.
    let changed = WEB
        .replace("labels: {app: web}}", "labels: {tier: front}}")
        .replace("targetPort: http", "targetPort: 81")
        .replace(
            "    - podSelector: {matchLabels: {role: client}}",
            "    - ipBlock: {cidr: 10.0.0.0/8}",
        );
    let file = kubectl.file("web.yaml", &changed);
    assert_eq!(
        kubectl
            .run_file("apply", &file)
            .matches(" configured")
            .count(),
        3
    );
    let pod = store.get(PODS, "shop", "web-1").unwrap();
    assert_eq!(pod["metadata"]["labels"], json!({"tier": "front"}));
    let service = store.get(SERVICES, "shop", "web").unwrap();
    assert_eq!(service["spec"]["ports"][0]["targetPort"], 81);
    assert_eq!(service["spec"]["clusterIP"], address);
    let policy = store.get(NETWORK_POLICIES, "shop", "allow-web").unwrap();
    let peer = json!([{"ipBlock": {"cidr": "10.0.0.0/8"}}]);
    assert_eq!(policy["spec"]["ingress"][0]["from"], peer);

    kubectl.run("label pod web-1 -n shop app=web tier-");
    kubectl.run("annotate pod web-1 -n shop note=yes");
    kubectl.run("label ns shop team=a");
    assert_eq!(
        kubectl.run("get pods -A -l app=web -o name").trim(),
        "pod/web-1"
    );
    assert_eq!(
        kubectl.run("get ns -l team=a -o name").trim(),
        "namespace/shop"
    );
    let patch = r#"[{"op":"replace","path":"/spec/policyTypes","value":["Ingress","Egress"]}]"#;
    kubectl.run(&format!(
        "patch netpol allow-web -n shop --type=json -p {patch}"
    ));
    kubectl.run(r#"patch svc web -n shop -p {"spec":{"type":"NodePort"}}"#);
    kubectl.run(r#"patch svc web -n shop --type=merge -p {"spec":{"sessionAffinity":"ClientIP"}}"#);
    let service = store.get(SERVICES, "shop", "web").unwrap();
    let affinity = &service["spec"]["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"];
    assert_eq!(
        (affinity, &service["spec"]["type"]),
        (&json!(10_800), &json!("NodePort"))
    );

    let told = kubectl.run("describe netpol allow-web -n shop");
    assert!(
        told.contains("CIDR: 10.0.0.0/8") && told.contains("Policy Types: Ingress, Egress"),
        "{told}"
    );
    kubectl.run("describe svc web -n shop");
    kubectl.run("describe pod web-1 -n shop");

    kubectl.run("delete pod web-1 -n shop");
    assert!(store.get(PODS, "shop", "web-1").is_err());
    kubectl.run_file("delete --ignore-not-found", &file);
    assert!(store.get(NAMESPACES, "", "shop").is_err());
    assert!(store.list(SERVICES, "shop").is_empty());
}

#[test]
fn create_commands() {
    let kubectl = kubectl!();
    let store = &kubectl.server.store;
    kubectl.run("create namespace shop");
    kubectl.run("run client -n shop --image=busybox --labels=role=client --port=80");
    kubectl.run("expose pod client -n shop --port=8080 --target-port=80");
    let service = store.get(SERVICES, "shop", "client").unwrap();
    assert_eq!(service["spec"]["selector"], json!({"role": "client"}));
    kubectl.run("create service clusterip headless -n shop --clusterip=None --tcp=80");
    let service = store.get(SERVICES, "shop", "headless").unwrap();
    assert_eq!(service["spec"]["clusterIP"], "None");
    kubectl.run("create service nodeport np -n shop --tcp=80:http --node-port=30123");
    let port = &store.get(SERVICES, "shop", "np").unwrap()["spec"]["ports"][0];
    assert_eq!(
        (&port["nodePort"], &port["targetPort"]),
        (&json!(30_123), &json!("http"))
    );
    kubectl.run("create service externalname en -n shop --external-name=example.com");
    kubectl.run("create configmap settings -n shop --from-literal=a=b");
    assert_eq!(
        kubectl.run("get cm settings -n shop -o jsonpath={.data.a}"),
        "b"
    );
    kubectl.run("create serviceaccount robot -n shop");
    kubectl.run("create service clusterip never -n shop --tcp=80 --dry-run=server");
    assert!(store.get(SERVICES, "shop", "never").is_err());
    kubectl.run("delete namespace shop");
}

#[test]
fn refusals_name_the_field() {
    let kubectl = kubectl!();
    let policy = |spec: &str| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p}}\n\
             spec: {spec}\n"
        )
    };
    for (spec, told) in [
        ("{podSelectr: {}}", "unknown field \"spec.podSelectr\""),
        (
            "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/40}}]}]}",
            "spec.ingress[0].from[0].ipBlock.cidr: Invalid value: \"10.0.0.0/40\"",
        ),
        (
            "{podSelector: {}, policyTypes: [Both]}",
            "supported values: \"Egress\", \"Ingress\"",
        ),
        (
            "{podSelector: {}, ingress: {}}",
            "cannot be handled as a NetworkPolicy",
        ),
    ] {
        let file = kubectl.file("policy.yaml", &policy(spec));
        let (good, text) = kubectl.output(&format!("apply -f {}", file.display()));
        assert!(!good && text.contains(told), "{spec}: {text}");
    }
    let (good, text) = kubectl.output("get pods nobody");
    assert!(
        !good && text.contains("pods \"nobody\" not found"),
        "{text}"
    );
    let (good, text) = kubectl.output("get widgets");
    assert!(
        !good && text.contains("doesn't have a resource type"),
        "{text}"
    );
    assert!(kubectl.server.store.list(NETWORK_POLICIES, "").is_empty());
}

#[test]
fn server_side_apply() {
    let kubectl = kubectl!();
    let store = &kubectl.server.store;
    let service = |labels: &str, ports: &str| {
        kubectl.file(
            "service.yaml",
            &format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: web, labels: {labels}}}\n\
                 spec: {{selector: {{app: web}}, ports: {ports}}}\n"
            ),
        )
    };
    let apply = "apply --server-side";
    kubectl.run_file(
        apply,
        &service("{a: x, b: x}", "[{name: a, port: 80}, {name: b, port: 81}]"),
    );
    kubectl.run_file(apply, &service("{a: x}", "[{name: b, port: 81}]"));
    let stored = store.get(SERVICES, "default", "web").unwrap();
    assert_eq!(stored["metadata"]["labels"], json!({"a": "x"}));
    let ports: Vec<_> = stored["spec"]["ports"].as_array().unwrap().iter().collect();
    assert_eq!((ports.len(), &ports[0]["port"]), (1, &json!(81)));

    let file = service("{a: c}", "[{name: b, port: 81}]");
    let other = format!(
        "apply --server-side --field-manager=other -f {}",
        file.display()
    );
    let (good, text) = kubectl.output(&other);
    assert!(!good && text.contains(".metadata.labels.a"), "{text}");
    kubectl.run(&format!("{other} --force-conflicts"));
    let stored = store.get(SERVICES, "default", "web").unwrap();
    assert_eq!(stored["metadata"]["labels"], json!({"a": "c"}));
}

#[test]
fn get_prints_tables_and_follows_changes() {
    let kubectl = kubectl!();
    let store = &kubectl.server.store;
    let node = json!({
        "metadata": {"name": "n1"},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    });
    store
        .create(hachi_apiserver::resource::NODES, node)
        .unwrap();
    store
        .create(PODS, support::pod("web", json!({"app": "web"})))
        .unwrap();
    eventually("the Pod is bound", || {
        let pod = store.get(PODS, "default", "web").unwrap();
        pod["spec"]["nodeName"].is_string().then_some(())
    });
    let mut follow = kubectl
        .command("get pods -w -o wide")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut rows = BufReader::new(follow.stdout.take().unwrap()).lines();
    let mut row = || rows.next().expect("a row").unwrap();
    assert!(row().starts_with("NAME"));
    assert!(row().contains("Pending"));
    let mut wait = kubectl.command("wait --for=condition=Ready pod/web --timeout=20s");
    let mut wait = wait.stdout(Stdio::null()).spawn().unwrap();
    let run = |pod: &mut Value| {
        pod["status"] = json!({
            "phase": "Running",
            "podIP": "10.244.0.2",
            "podIPs": [{"ip": "10.244.0.2"}],
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{"name": "c", "ready": true, "restartCount": 0, "image": "i", "imageID": ""}],
        });
    };
    store.modify_status(PODS, "default", "web", run).unwrap();
    while !row().contains("Running") {}
    // By SIGTERM, which `timeout` passes on to it.
    let end = format!("kill {}", follow.id());
    let ended = Command::new("sh").args(["-c", &end]).status().unwrap();
    assert!(ended.success(), "{ended}");
    follow.wait().unwrap();
    assert!(wait.wait().unwrap().success());
    let table = kubectl.run("get pods -o wide");
    let row = table.lines().nth(1).unwrap_or_default();
    let cells: Vec<_> = row.split_whitespace().collect();
    assert_eq!(cells[..4], ["web", "1/1", "Running", "0"], "{table}");
    assert_eq!(cells[5..7], ["10.244.0.2", "n1"], "{table}");
    for (what, told) in [
        ("svc", "10.96.0.1"),
        ("nodes", "Ready"),
        ("ns", "Active"),
        ("endpointslices", "127.0.0.1"),
        ("netpol", "No resources found"),
        ("all,cm,sa,events,leases", "service/kubernetes"),
    ] {
        let table = kubectl.run(&format!("get {what}"));
        assert!(table.contains(told), "{what}: {table}");
    }
}
