//! The image around its layer: configuration, manifest, index (OCI Image Format Specification 1.1).

use std::io::{self, Write as _};

use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::layer;

/// A blob under the name of its content.
struct Blob {
    digest: String,
    content: Vec<u8>,
}

impl Blob {
    fn new(content: Vec<u8>) -> Self {
        let digest = Sha256::digest(&content)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Self { digest, content }
    }

    fn json(value: &Value) -> Self {
        Self::new(value.to_string().into_bytes())
    }

    fn descriptor(&self, media_type: &str) -> Value {
        json!({
            "mediaType": media_type,
            "digest": format!("sha256:{}", self.digest),
            "size": self.content.len(),
        })
    }

    fn file(self) -> (String, Vec<u8>) {
        (format!("blobs/sha256/{}", self.digest), self.content)
    }
}

/// The archive of an image with this one layer. `reference` is `NAME:TAG`, without a registry.
pub(crate) fn archive(content: &[u8], reference: &str) -> io::Result<Vec<u8>> {
    let (name, tag) = reference.rsplit_once(':').unwrap_or((reference, "latest"));
    let unpacked = Blob::new(content.to_vec());
    // Without a time or a name in its header the same content gives the same bytes.
    let mut packed = GzEncoder::new(Vec::new(), Compression::best());
    packed.write_all(&unpacked.content)?;
    let layer = Blob::new(packed.finish()?);
    let config = Blob::json(&json!({
        "architecture": "amd64",
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": {
            "Entrypoint": ["/usr/bin/hachi-agent"],
            "Env": ["PATH=/usr/bin"],
            "Labels": { "org.opencontainers.image.title": name, "org.opencontainers.image.version": tag },
        },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", unpacked.digest)] },
        "history": [{ "created": "1970-01-01T00:00:00Z", "created_by": "cargo xtask image" }],
    }));
    let manifest = Blob::json(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config.descriptor("application/vnd.oci.image.config.v1+json"),
        "layers": [layer.descriptor("application/vnd.oci.image.layer.v1.tar+gzip")],
    }));
    let mut listed = manifest.descriptor("application/vnd.oci.image.manifest.v1+json");
    listed["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    listed["annotations"] = json!({
        // What containerd names the image: a reference without a registry stands for this one.
        "io.containerd.image.name": format!("docker.io/{reference}"),
        "org.opencontainers.image.ref.name": tag,
    });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [listed],
    });
    // What `docker load` reads where it knows no OCI layout.
    let docker = json!([{
        "Config": format!("blobs/sha256/{}", config.digest),
        "RepoTags": [reference],
        "Layers": [format!("blobs/sha256/{}", layer.digest)],
    }]);
    let mut files = vec![
        (
            "oci-layout".to_owned(),
            br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec(),
        ),
        ("index.json".to_owned(), index.to_string().into_bytes()),
        ("manifest.json".to_owned(), docker.to_string().into_bytes()),
    ];
    let mut blobs = [config.file(), manifest.file(), layer.file()];
    blobs.sort();
    files.extend(blobs);
    layer::pack_data(&files)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read as _;
    use std::process::Command;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn every_descriptor_leads_to_a_blob_of_its_digest_and_size() {
        let archived = archive(b"a layer", "hachi/hachi:1.2.3").unwrap();
        assert_eq!(archived, archive(b"a layer", "hachi/hachi:1.2.3").unwrap());
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(archived.as_slice()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            files.insert(entry.path().unwrap().display().to_string(), content);
        }
        let blob = |descriptor: &Value| -> Vec<u8> {
            let digest = descriptor["digest"].as_str().unwrap().replace(':', "/");
            let content = files[&format!("blobs/{digest}")].clone();
            assert_eq!(descriptor["size"], content.len());
            assert_eq!(
                format!("sha256/{}", Blob::new(content.clone()).digest),
                digest
            );
            content
        };
        let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        let listed = &index["manifests"][0];
        assert_eq!(
            listed["annotations"]["io.containerd.image.name"],
            "docker.io/hachi/hachi:1.2.3"
        );
        let manifest: Value = serde_json::from_slice(&blob(listed)).unwrap();
        let mut layer = Vec::new();
        let packed = blob(&manifest["layers"][0]);
        flate2::read::GzDecoder::new(packed.as_slice())
            .read_to_end(&mut layer)
            .unwrap();
        assert_eq!(layer, b"a layer");
        let config: Value = serde_json::from_slice(&blob(&manifest["config"])).unwrap();
        let unpacked = format!("sha256:{}", Blob::new(layer).digest);
        assert_eq!(config["rootfs"]["diff_ids"][0], unpacked);
        assert_eq!(config["config"]["Entrypoint"][0], "/usr/bin/hachi-agent");
    }

    /// A containerd of the test's own, with nothing of the machine's.
    struct Containerd {
        child: std::process::Child,
        address: std::path::PathBuf,
    }

    impl Containerd {
        fn start(dir: &std::path::Path) -> Self {
            let config = dir.join("config.toml");
            // The one would look for a network, the other make a directory of the machine's.
            let disabled = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"];
            let text = format!("version = 2\ndisabled_plugins = {disabled:?}\n");
            std::fs::write(&config, text).unwrap();
            let address = dir.join("containerd.sock");
            let log = std::fs::File::create(dir.join("log")).unwrap();
            let child = Command::new("containerd")
                .arg("--config")
                .arg(config)
                .arg("--root")
                .arg(dir.join("root"))
                .arg("--state")
                .arg(dir.join("state"))
                .arg("--address")
                .arg(&address)
                .stdout(log.try_clone().unwrap())
                .stderr(log)
                .spawn()
                .unwrap();
            let begun = Instant::now();
            while !address.exists() && begun.elapsed() < Duration::from_secs(60) {
                std::thread::sleep(Duration::from_millis(50));
            }
            Self { child, address }
        }

        fn ctr(&self, arguments: &[&str]) -> String {
            let output = Command::new("ctr")
                .arg("--address")
                .arg(&self.address)
                .args(["--namespace", "k8s.io"])
                .args(arguments)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{arguments:?}: {said}");
            String::from_utf8(output.stdout).unwrap()
        }
    }

    impl Drop for Containerd {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    /// As `ctr -n k8s.io images import` on a node, and `kind load image-archive`, which runs that.
    #[test]
    fn containerd_takes_the_archive_and_unpacks_it() {
        hachi_testutil::require_root!();
        if Command::new("containerd")
            .arg("--version")
            .output()
            .is_err()
        {
            hachi_testutil::skip!("needs containerd; cargo xtask setup installs it");
        }
        let dir = tempfile::tempdir().unwrap();
        let program = ("usr/bin/hachi".to_owned(), b"a program".to_vec());
        let packed = layer::pack(&[program]).unwrap();
        let file = dir.path().join("hachi.tar");
        std::fs::write(&file, archive(&packed, "hachi/hachi:1.2.3").unwrap()).unwrap();
        let containerd = Containerd::start(dir.path());
        let import = ["images", "import", "--snapshotter", "native"];
        containerd.ctr(&[&import[..], &[&file.to_string_lossy()]].concat());
        let listed = containerd.ctr(&["images", "list"]);
        let name = "docker.io/hachi/hachi:1.2.3";
        let line = listed.lines().find(|line| line.starts_with(name));
        assert!(
            line.is_some_and(|it| it.contains("linux/amd64")),
            "{listed}"
        );
        let snapshots = containerd.ctr(&["snapshots", "--snapshotter", "native", "list"]);
        assert_eq!(snapshots.lines().count(), 2, "{snapshots}");
    }
}
