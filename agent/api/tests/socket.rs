//! Client and server over a real socket in a temporary directory; needs no privilege.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::IpAddr,
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use hachi_api::{
    ApiError, Attachment, AttachmentId, Client, ClientError, MAX_REQUEST, PodRef, PortMapping,
    PortProtocol, Reply, Request, Status, Table, serve,
};
use tokio::{
    sync::{Notify, oneshot},
    task::JoinHandle,
};

fn id(name: &str) -> AttachmentId {
    AttachmentId {
        container_id: name.into(),
        ifname: "eth0".into(),
    }
}

/// What is slow has its answer when this is told, and no earlier.
type Release = Arc<Notify>;

async fn handler(request: Request, release: Release) -> Reply {
    match request {
        Request::Status => Reply::Status {
            status: Box::new(Status::default()),
        },
        Request::DeleteEndpoint { attachment } if attachment.container_id == "slow" => {
            release.notified().await;
            Reply::Done
        }
        Request::CheckEndpoint { attachment } => Reply::Error {
            error: ApiError {
                code: 3,
                message: attachment.container_id,
                details: "d".into(),
            },
        },
        _ => Reply::Done,
    }
}

async fn done(_: Request) -> Reply {
    Reply::Done
}

struct Server {
    _dir: tempfile::TempDir,
    path: PathBuf,
    release: Release,
    stop: oneshot::Sender<()>,
    task: JoinHandle<std::io::Result<()>>,
}

async fn start() -> Server {
    let dir = tempfile::tempdir().unwrap();
    start_in(dir).await
}

async fn start_in(dir: tempfile::TempDir) -> Server {
    let path = dir.path().join("agent.sock");
    let (stop, stopped) = oneshot::channel();
    let release = Release::default();
    let task = tokio::spawn({
        let (path, release) = (path.clone(), Arc::clone(&release));
        let handler = move |request| handler(request, Arc::clone(&release));
        async move { serve(&path, handler, async move { drop(stopped.await) }).await }
    });
    let deadline = Instant::now() + Duration::from_secs(5);
    while tokio::net::UnixStream::connect(&path).await.is_err() {
        assert!(Instant::now() < deadline, "the server did not start");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Server {
        _dir: dir,
        path,
        release,
        stop,
        task,
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

#[tokio::test]
async fn several_requests_on_one_connection() {
    let server = start().await;
    let path = server.path.clone();
    blocking(move || {
        let mut client = Client::connect(&path).unwrap();
        assert!(matches!(
            client.call(&Request::Status).unwrap(),
            Reply::Status { .. }
        ));
        let delete = Request::DeleteEndpoint {
            attachment: id("a"),
        };
        client.perform(&delete, Duration::from_secs(5)).unwrap();
        let check = Request::CheckEndpoint {
            attachment: id("b"),
        };
        let error = client.perform(&check, Duration::from_secs(5)).unwrap_err();
        assert!(matches!(&error, ClientError::Refused(e) if e.code == 3 && e.message == "b"));
        assert!(!error.is_unreachable());
        // Not an answer to the question.
        let error = client
            .perform(&Request::Status, Duration::from_secs(5))
            .unwrap_err();
        assert!(matches!(error, ClientError::Garbled(_)), "{error}");
    })
    .await;
    server.stop.send(()).unwrap();
    server.task.await.unwrap().unwrap();
    assert!(!server.path.exists(), "the socket is removed at the end");
}

#[tokio::test]
async fn a_slow_request_does_not_hold_up_others() {
    let server = start().await;
    let (path, release) = (server.path.clone(), Arc::clone(&server.release));
    blocking(move || {
        let mut slow = Client::connect(&path).unwrap();
        slow.send(&Request::DeleteEndpoint {
            attachment: id("slow"),
        })
        .unwrap();
        assert!(matches!(
            Client::connect(&path)
                .unwrap()
                .call(&Request::Status)
                .unwrap(),
            Reply::Status { .. }
        ));
        release.notify_one();
        slow.receive_done(Duration::from_secs(5)).unwrap();
    })
    .await;
}

#[tokio::test]
async fn an_answer_that_does_not_come_is_a_timeout() {
    let server = start().await;
    let path = server.path.clone();
    blocking(move || {
        let mut client = Client::connect(&path).unwrap();
        let request = Request::DeleteEndpoint {
            attachment: id("slow"),
        };
        let error = client
            .call_within(&request, Duration::from_millis(30))
            .unwrap_err();
        assert!(matches!(error, ClientError::TimedOut(_)), "{error}");
    })
    .await;
}

#[tokio::test]
async fn requests_under_way_are_answered_at_the_end() {
    let server = start().await;
    let path = server.path.clone();
    let mut client = blocking(move || {
        let mut client = Client::connect(&path).unwrap();
        client
            .send(&Request::DeleteEndpoint {
                attachment: id("slow"),
            })
            .unwrap();
        client
    })
    .await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    server.stop.send(()).unwrap();
    server.release.notify_one();
    blocking(move || client.receive_done(Duration::from_secs(5)))
        .await
        .unwrap();
}

fn raw(path: &Path, bytes: &[u8]) -> Reply {
    let mut stream = UnixStream::connect(path).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    stream.write_all(bytes).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

#[tokio::test]
async fn what_is_not_a_request_is_answered_with_its_code() {
    let server = start().await;
    let path = server.path.clone();
    blocking(move || {
        let mut long = vec![b' '; MAX_REQUEST + 1];
        long.push(b'\n');
        let table: [(&[u8], u32); 7] = [
            (b"{\n", 6),
            (b"\xff\xfe\n", 6),
            (b"\n", 6),
            (b"{\"op\": \"explode\"}\n", 7),
            (b"{\"op\": \"gc\", \"valid\": [], \"more\": 1}\n", 7),
            (
                b"{\"op\": \"deleteEndpoint\", \"attachment\": {\"containerId\": \"x\"}}\n",
                7,
            ),
            (&long, 6),
        ];
        for (bytes, code) in table {
            let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(60)]);
            match raw(&path, bytes) {
                Reply::Error { error } => assert_eq!(error.code, code, "{shown}: {error}"),
                other => panic!("{shown}: {other:?}"),
            }
        }
        // And it still serves.
        assert!(
            Client::connect(&path)
                .unwrap()
                .call(&Request::Status)
                .is_ok()
        );
    })
    .await;
}

#[tokio::test]
async fn a_bad_request_does_not_end_the_connection() {
    let server = start().await;
    let path = server.path.clone();
    blocking(move || {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream
            .write_all(b"nonsense\n{\"op\": \"status\"}\n")
            .unwrap();
        let mut lines = BufReader::new(stream).lines();
        assert!(lines.next().unwrap().unwrap().contains("error"));
        assert!(lines.next().unwrap().unwrap().contains("status"));
    })
    .await;
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let server = start_in(dir).await;
    let found = std::fs::metadata(&server.path).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o600);

    let error = serve(&server.path, done, std::future::pending())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    let path = server.path.clone();
    blocking(move || {
        Client::connect(&path)
            .unwrap()
            .call(&Request::Status)
            .unwrap()
    })
    .await;
}

#[tokio::test]
async fn a_file_that_is_no_socket_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("precious");
    std::fs::write(&path, "keep").unwrap();
    let error = serve(&path, done, std::future::pending())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "keep");
}

#[test]
fn nobody_there_is_unreachable() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    assert!(
        Client::connect(&path).unwrap_err().is_unreachable(),
        "no file"
    );
    drop(UnixListener::bind(&path).unwrap());
    assert!(
        Client::connect(&path).unwrap_err().is_unreachable(),
        "nobody listens"
    );
}

#[test]
fn an_agent_that_hangs_up_is_not_unreachable() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || drop(listener.accept().unwrap()));
    let mut client = Client::connect(&path).unwrap();
    let error = client.call(&Request::Status).unwrap_err();
    assert!(matches!(error, ClientError::Broken(_)), "{error}");
    server.join().unwrap();
}

#[test]
fn every_request_survives_the_wire() {
    let attachment = Attachment {
        id: id("c"),
        netns: "/run/netns/x".into(),
        pod: Some(PodRef {
            namespace: "n".into(),
            name: "p".into(),
            uid: None,
        }),
        host_ifname: "hachi0123456789".into(),
        host_ifindex: 7,
        mac: "02:00:00:00:00:01".into(),
        host_mac: "02:00:00:00:00:02".into(),
        addresses: vec![IpAddr::from([10, 0, 0, 2]), "fd00::2".parse().unwrap()],
        port_mappings: vec![PortMapping {
            host_ip: Some(IpAddr::from([192, 0, 2, 1])),
            host_port: 8080,
            container_port: 80,
            protocol: PortProtocol::Sctp,
        }],
        masquerade: true,
    };
    let pod = attachment.pod.clone().unwrap();
    for request in [
        Request::Pool,
        Request::Pod { pod },
        Request::AddEndpoint { attachment },
        Request::DeleteEndpoint {
            attachment: id("c"),
        },
        Request::CheckEndpoint {
            attachment: id("c"),
        },
        Request::Gc {
            valid: vec![id("a"), id("b")],
        },
        Request::Status,
        Request::Get {
            table: Table::Conntrack,
        },
    ] {
        let text = serde_json::to_string(&request).unwrap();
        assert!(!text.contains('\n'));
        assert_eq!(
            serde_json::from_str::<Request>(&text).unwrap(),
            request,
            "{text}"
        );
    }
}
