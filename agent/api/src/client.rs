//! The blocking client: the plugin and the CLI ask one thing and end, so they need no runtime.

use std::{
    io::{self, BufRead, BufReader, ErrorKind, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{ApiError, MAX_REPLY, Reply, Request};

/// How long [`Client::call`] waits for an answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no answer. "No agent" and "the agent said no" are different variants, because
/// callers act differently on them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nothing listens on the socket.
    #[error("no agent listens on {}: {source}", path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// Why the connection failed.
        source: io::Error,
    },
    /// The connection broke before the answer came.
    #[error("the agent hung up before it answered: {0}")]
    Broken(#[source] io::Error),
    /// The answer did not come in time.
    #[error("the agent did not answer within {} s", .0.as_secs_f32())]
    TimedOut(Duration),
    /// The answer is not one of this API.
    #[error("the agent's answer is not understood: {0}")]
    Garbled(String),
    /// The agent answered with an error.
    #[error(transparent)]
    Refused(ApiError),
}

impl ClientError {
    /// Whether the agent never got to hear of the request: nobody listens.
    #[must_use]
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }
}

/// A connection to the agent.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the agent's socket.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        match UnixStream::connect(path) {
            Ok(stream) => Ok(Self {
                stream: BufReader::new(stream),
            }),
            Err(source) => Err(ClientError::Unreachable {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// Asks and waits for the answer, which may be [`Reply::Error`].
    pub fn call(&mut self, request: &Request) -> Result<Reply, ClientError> {
        self.call_within(request, TIMEOUT)
    }

    /// As [`Client::call`], with a time of its own.
    pub fn call_within(
        &mut self,
        request: &Request,
        timeout: Duration,
    ) -> Result<Reply, ClientError> {
        self.send(request)?;
        self.receive(timeout)
    }

    /// Asks for something that is answered with [`Reply::Done`].
    pub fn perform(&mut self, request: &Request, timeout: Duration) -> Result<(), ClientError> {
        self.send(request)?;
        self.receive_done(timeout)
    }

    /// Sends a request; its answer is collected with [`Client::receive`], so that the caller can
    /// do something else in between.
    pub fn send(&mut self, request: &Request) -> Result<(), ClientError> {
        let mut line =
            serde_json::to_vec(request).map_err(|error| ClientError::Garbled(error.to_string()))?;
        line.push(b'\n');
        let stream = self.stream.get_mut();
        stream
            .set_write_timeout(Some(TIMEOUT))
            .map_err(ClientError::Broken)?;
        stream.write_all(&line).map_err(|error| match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => ClientError::TimedOut(TIMEOUT),
            _ => ClientError::Broken(error),
        })
    }

    /// The answer to the oldest request that has none yet.
    pub fn receive(&mut self, timeout: Duration) -> Result<Reply, ClientError> {
        let line = self.read_line(timeout)?;
        serde_json::from_slice(&line).map_err(|error| ClientError::Garbled(error.to_string()))
    }

    /// As [`Client::receive`], for a request that is answered with [`Reply::Done`].
    pub fn receive_done(&mut self, timeout: Duration) -> Result<(), ClientError> {
        match self.receive(timeout)? {
            Reply::Done => Ok(()),
            Reply::Error { error } => Err(ClientError::Refused(error)),
            other => Err(ClientError::Garbled(format!(
                "an answer to another question: {other:?}"
            ))),
        }
    }

    fn read_line(&mut self, timeout: Duration) -> Result<Vec<u8>, ClientError> {
        let deadline = Instant::now() + timeout;
        let mut line = Vec::new();
        loop {
            // A zero timeout would mean "for ever" to the socket.
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ClientError::TimedOut(timeout));
            }
            self.stream
                .get_ref()
                .set_read_timeout(Some(left))
                .map_err(ClientError::Broken)?;
            let chunk = match self.stream.fill_buf() {
                Ok([]) => return Err(ClientError::Broken(ErrorKind::UnexpectedEof.into())),
                Ok(chunk) => chunk,
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => continue,
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                        return Err(ClientError::TimedOut(timeout));
                    }
                    _ => return Err(ClientError::Broken(error)),
                },
            };
            let (used, complete) = match chunk.iter().position(|byte| *byte == b'\n') {
                Some(end) => (end + 1, true),
                None => (chunk.len(), false),
            };
            line.extend_from_slice(&chunk[..used]);
            self.stream.consume(used);
            if complete {
                return Ok(line);
            }
            if line.len() > MAX_REPLY {
                return Err(ClientError::Garbled(format!(
                    "longer than {MAX_REPLY} bytes"
                )));
            }
        }
    }
}
