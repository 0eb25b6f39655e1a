//! The agent's side of the socket.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    task::JoinSet,
    time::timeout,
};
use tracing::{debug, warn};

use crate::{ApiError, MAX_REQUEST, Reply, Request};

/// Connections at once; more wait to be accepted.
const CONNECTIONS: usize = 256;
/// How long a connection may be silent between requests before it makes room for others.
const IDLE: Duration = Duration::from_secs(60);
/// How long requests under way may take after `shutdown`.
const GRACE: Duration = Duration::from_secs(5);

/// How much of a request that is too long is read after it has been refused, bytes.
const DRAIN: u64 = 16 << 20;

/// CNI error codes that the server answers with by itself.
mod code {
    pub(super) const INVALID_ENVIRONMENT: u32 = 4;
    pub(super) const DECODING: u32 = 6;
    pub(super) const INVALID_REQUEST: u32 = 7;
}

/// Serves the socket at `path` until `shutdown` is ready, with `handler` called once a request.
///
/// A socket left behind by an agent that died is replaced; one that an agent still listens on is an
/// error. Only root (and the user that the agent itself runs as) may speak.
pub async fn serve<F, Fut>(
    path: &Path,
    handler: F,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()>
where
    F: Fn(Request) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = Reply> + Send + 'static,
{
    let (listener, socket) = Socket::bind(path).await?;
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let place = tokio::select! {
            () = &mut shutdown => break,
            place = Arc::clone(&room).acquire_owned() => {
                place.map_err(io::Error::other)?
            }
        };
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            accepted = listener.accept() => accepted,
        };
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((stream, _)) => {
                let handler = handler.clone();
                let owner = socket.owner;
                connections.spawn(async move {
                    let _place = place;
                    if let Err(error) = converse(stream, owner, handler).await {
                        debug!(%error, "a client's connection broke");
                    }
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: others are being closed meanwhile.
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop(listener);
    drop(socket);
    let finish = async { while connections.join_next().await.is_some() {} };
    if timeout(GRACE, finish).await.is_err() {
        warn!("requests still under way at the end were cut off");
    }
    Ok(())
}

/// The socket file, removed when the server ends.
struct Socket {
    path: PathBuf,
    inode: u64,
    owner: u32,
}

impl Socket {
    async fn bind(path: &Path) -> io::Result<(UnixListener, Self)> {
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(io::Error::new(
                    io::ErrorKind::AlreadyExists,
                    format!("{} exists and is not a socket", path.display()),
                ));
            }
            Ok(_) if UnixStream::connect(path).await.is_ok() => {
                return Err(io::Error::new(
                    io::ErrorKind::AddrInUse,
                    format!("another agent listens on {}", path.display()),
                ));
            }
            _ => {}
        }
        // Bound under another name first: nobody can connect before the mode is set, and the
        // rename replaces a stale file without a moment in which there is none.
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}", std::process::id()));
        let fresh = PathBuf::from(name);
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&fresh)?;
        let prepare = || {
            fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))?;
            let found = fs::metadata(&fresh)?;
            fs::rename(&fresh, path)?;
            Ok(found)
        };
        match prepare() {
            Ok(found) => Ok((
                listener,
                Self {
                    path: path.to_owned(),
                    inode: found.ino(),
                    owner: found.uid(),
                },
            )),
            Err(error) => {
                let _ = fs::remove_file(&fresh);
                Err(error)
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Another agent may have taken the path over.
        if fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

async fn converse<F, Fut>(mut stream: UnixStream, owner: u32, handler: F) -> io::Result<()>
where
    F: Fn(Request) -> Fut,
    Fut: Future<Output = Reply>,
{
    let peer = stream.peer_cred()?.uid();
    let (reader, mut writer) = stream.split();
    if peer != 0 && peer != owner {
        return send(
            &mut writer,
            &refuse(
                code::INVALID_ENVIRONMENT,
                "only root may speak to the agent".into(),
            ),
        )
        .await;
    }
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        let limit = MAX_REQUEST as u64 + 1;
        let mut bounded = (&mut reader).take(limit);
        let Ok(read) = timeout(IDLE, bounded.read_until(b'\n', &mut line)).await else {
            return Ok(());
        };
        if read? == 0 {
            return Ok(());
        }
        if line.last() != Some(&b'\n') && line.len() > MAX_REQUEST {
            let why = format!("a request may be {MAX_REQUEST} bytes long");
            // What follows is the rest of this line, so the conversation cannot go on. It is read
            // all the same: closing over unread bytes would take the answer from the client too.
            send(&mut writer, &refuse(code::DECODING, why)).await?;
            writer.shutdown().await?;
            let mut rest = reader.take(DRAIN);
            let mut nowhere = tokio::io::sink();
            let drain = tokio::io::copy(&mut rest, &mut nowhere);
            return timeout(GRACE, drain)
                .await
                .map_or(Ok(()), |read| read.map(drop));
        }
        let reply = match parse(&line) {
            Ok(request) => handler(request).await,
            Err(error) => Reply::Error { error },
        };
        send(&mut writer, &reply).await?;
    }
}

fn parse(line: &[u8]) -> Result<Request, ApiError> {
    let value: serde_json::Value = serde_json::from_slice(line).map_err(|error| ApiError {
        code: code::DECODING,
        message: format!("the request is not JSON: {error}"),
        details: String::new(),
    })?;
    serde_json::from_value(value).map_err(|error| ApiError {
        code: code::INVALID_REQUEST,
        message: format!("the request is not understood: {error}"),
        details: "plugin, command line and agent must be of one version".into(),
    })
}

fn refuse(code: u32, message: String) -> Reply {
    Reply::Error {
        error: ApiError {
            code,
            message,
            details: String::new(),
        },
    }
}

async fn send(writer: &mut (impl tokio::io::AsyncWrite + Unpin), reply: &Reply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    writer.write_all(&line).await
}
