//! Calling the plugin as a runtime does: environment, stdin, exit status, stdout.
#![expect(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses a part of it"
)]

use std::{
    collections::BTreeMap,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::{Value, json};

pub mod node;

/// The attachment `eth0` of a container.
pub fn id(container: &str) -> hachi_api::AttachmentId {
    hachi_api::AttachmentId {
        container_id: container.into(),
        ifname: "eth0".into(),
    }
}

/// The plugin refused with that code, and said that text.
pub fn fails(answer: &Answer, code: u64, text: &str) {
    assert_eq!(answer.code(), code, "{answer:?}");
    assert!(
        answer.stdout.contains(text),
        "{text:?} is not in {answer:?}"
    );
}

/// What the plugin did.
#[derive(Debug)]
pub struct Answer {
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
}

impl Answer {
    /// The object on stdout.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or(Value::Null)
    }

    /// The error code; 0 for success.
    pub fn code(&self) -> u64 {
        if self.success {
            0
        } else {
            self.json()["code"].as_u64().unwrap_or(u64::MAX)
        }
    }

    /// Panics unless the plugin succeeded.
    pub fn ok(self) -> Value {
        assert!(self.success, "{self:?}");
        self.json()
    }
}

/// One call.
#[derive(Clone, Debug)]
pub struct Call {
    env: BTreeMap<String, String>,
    stdin: Vec<u8>,
}

impl Call {
    pub fn new(command: &str, conf: &Value) -> Self {
        let call = Self {
            env: BTreeMap::new(),
            stdin: conf.to_string().into_bytes(),
        };
        call.env("CNI_COMMAND", command)
            .env("CNI_PATH", "/opt/cni/bin")
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        self.env.remove(name);
        self
    }

    pub fn stdin(mut self, text: impl Into<Vec<u8>>) -> Self {
        self.stdin = text.into();
        self
    }

    pub fn container(self, id: &str, netns: &str) -> Self {
        self.env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", "eth0")
    }

    /// The process, with its input written.
    pub fn start(&self) -> std::process::Child {
        self.start_with(Stdio::piped())
    }

    /// The same, and where it writes its answer to.
    pub fn start_with(&self, stdout: Stdio) -> std::process::Child {
        let mut child = Command::new(env!("CARGO_BIN_EXE_hachi-cni"))
            .env_clear()
            .envs(&self.env)
            .stdin(Stdio::piped())
            .stdout(stdout)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A plugin that has read enough, or was killed, may close its end.
        let _ = child.stdin.take().unwrap().write_all(&self.stdin);
        child
    }

    pub fn run(&self) -> Answer {
        let output = self.start().wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Answer {
            success: output.status.success(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }
}

/// A configuration that works with no agent.
pub fn alone(dir: &Path, version: &str) -> Value {
    json!({
        "cniVersion": version,
        "name": "net",
        "type": "hachi-cni",
        "agent": "optional",
        "agentSocket": dir.join("agent.sock"),
        "ipam": {
            "dataDir": dir.join("store"),
            "ranges": [[{"subnet": "10.9.0.0/29"}], [{"subnet": "fd09::/125"}]],
        },
    })
}

/// RFC 7396: `null` removes a field.
pub fn patched(conf: &Value, patch: &Value) -> Value {
    let (Value::Object(conf), Value::Object(patch)) = (conf, patch) else {
        return patch.clone();
    };
    let mut result = conf.clone();
    for (key, value) in patch {
        if value.is_null() {
            result.remove(key);
        } else {
            let old = result.get(key).cloned().unwrap_or_else(|| json!({}));
            result.insert(key.clone(), patched(&old, value));
        }
    }
    Value::Object(result)
}

/// Every file below a directory with its content.
pub fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut directories = vec![dir.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory)
            .into_iter()
            .flatten()
            .flatten()
        {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => directories.push(entry.path()),
                Ok(kind) if kind.is_file() => {
                    found.insert(
                        entry.path(),
                        std::fs::read(entry.path()).unwrap_or_default(),
                    );
                }
                _ => {}
            }
        }
    }
    found
}

/// The configuration has passed: the next error is that `CNI_NETNS` does not exist.
pub const PASSED: u64 = 8;

/// One table of calls: a directory, and what is expected of each call.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub rows: usize,
}

impl Bench {
    pub fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            rows: 0,
        }
    }

    pub fn conf(&self, patch: &Value) -> Value {
        patched(&alone(self.dir.path(), "1.1.0"), patch)
    }

    pub fn call(&self, command: &str, patch: &Value) -> Call {
        let netns = self.dir.path().join("no-netns");
        Call::new(command, &self.conf(patch)).container("c1", netns.to_str().unwrap())
    }

    /// One row of a table: what comes out, and that nothing was written.
    pub fn expect(&mut self, what: &str, call: &Call, code: u64, text: &str) -> Answer {
        let before = files(self.dir.path());
        let answer = call.run();
        assert_eq!(answer.code(), code, "{what}: {answer:?}");
        if code != 0 {
            let error = answer.json();
            for key in ["cniVersion", "msg"] {
                let value = error[key].as_str().unwrap_or_default();
                assert!(!value.is_empty(), "{what}: {key} is missing: {answer:?}");
            }
            let keys: Vec<_> = error.as_object().unwrap().keys().cloned().collect();
            let known = ["cniVersion", "code", "details", "msg"];
            assert!(
                keys.iter().all(|key| known.contains(&key.as_str())),
                "{what}: {keys:?}"
            );
            assert_eq!(
                files(self.dir.path()),
                before,
                "{what}: left something behind"
            );
        }
        assert!(
            answer.stdout.contains(text),
            "{what}: {text:?} is not in {answer:?}"
        );
        self.rows += 1;
        answer
    }
}
