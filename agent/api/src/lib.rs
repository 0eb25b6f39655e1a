//! The agent's unix-socket API: types, server and client.
//!
//! ```text
//! Client::call ── one JSON object a line ──> serve ──> handler(Request) -> Reply
//!              <── one JSON object a line ──
//! ```
//! A connection carries any number of requests, each answered in turn. The plugin and the CLI use
//! the blocking [`Client`]; the agent runs [`serve`] beside its main task.
#![forbid(unsafe_code)]

mod client;
mod server;
mod types;

pub use client::{Client, ClientError};
pub use server::serve;
pub use types::{
    ApiError, Attachment, AttachmentId, ConntrackStatus, DEFAULT_SOCKET, FlowTrace, MapUse,
    MissingFeature, PodRef, PolicyTrace, PortMapping, PortProtocol, Reply, Request, SideTrace,
    Status, Table,
};

/// The longest request line that the server reads, bytes.
pub const MAX_REQUEST: usize = 1 << 20;

/// The longest reply line that the client reads, bytes: a table of every tracked flow fits.
pub const MAX_REPLY: usize = 256 << 20;
