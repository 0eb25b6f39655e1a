//! The agent's unix-socket API: types, server and client.
#![forbid(unsafe_code)]

mod types;

pub use types::{
    ApiError, Attachment, AttachmentId, DEFAULT_SOCKET, MapUse, PodRef, Reply, Request, Status,
    Table,
};
