//! The error object of the CNI specification.

use std::fmt::{self, Display};

use hachi_api::ClientError;
use hachi_net::{NetError, StoreError};
use serde_json::{Value, json};

use crate::version::Version;

/// Error codes: those of the specification, and from 100 on our own.
pub(crate) mod code {
    /// The configuration's version is not supported, or lacks the operation.
    pub(crate) const INCOMPATIBLE_VERSION: u32 = 1;
    /// A CNI variable is missing or makes no sense.
    pub(crate) const INVALID_ENVIRONMENT: u32 = 4;
    /// A file, or stdin or stdout, cannot be used.
    pub(crate) const IO: u32 = 5;
    /// The configuration is not JSON.
    pub(crate) const DECODING: u32 = 6;
    /// The configuration makes no sense.
    pub(crate) const INVALID_CONF: u32 = 7;
    /// `CNI_NETNS` is not a network namespace, or the plugin's own.
    pub(crate) const INVALID_NETNS: u32 = 8;
    /// Something that passes: no agent, a pool that is full, a lock held by another.
    pub(crate) const TRY_AGAIN_LATER: u32 = 11;
    /// STATUS: no ADD can be served now.
    pub(crate) const NOT_AVAILABLE: u32 = 50;
    /// The interface exists in the Pod already.
    pub(crate) const INTERFACE_EXISTS: u32 = 100;
    /// A requested address cannot be had.
    pub(crate) const ADDRESS_UNAVAILABLE: u32 = 101;
    /// CHECK: something is not as ADD made it.
    pub(crate) const NOT_AS_MADE: u32 = 102;
    /// The kernel refused a change of interfaces, addresses or routes.
    pub(crate) const KERNEL: u32 = 103;
    /// GC: something could not be removed; everything else was.
    pub(crate) const NOT_REMOVED: u32 = 104;
    /// A bug.
    pub(crate) const INTERNAL: u32 = 999;
}

/// What goes to stdout when an operation fails.
#[derive(Debug)]
pub(crate) struct Error {
    code: u32,
    message: String,
    details: String,
}

impl Error {
    pub(crate) fn new(code: u32, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            details: String::new(),
        }
    }

    /// An error in the configuration, at `field`.
    pub(crate) fn field(field: &str, why: impl Display) -> Self {
        Self::new(code::INVALID_CONF, format!("{field}: {why}"))
    }

    pub(crate) fn details(mut self, details: impl Display) -> Self {
        self.details = details.to_string();
        self
    }

    pub(crate) fn is(&self, code: u32) -> bool {
        self.code == code
    }

    pub(crate) fn code(mut self, code: u32) -> Self {
        self.code = code;
        self
    }

    /// The object, in the configuration's version if that is known.
    pub(crate) fn to_json(&self, version: Option<Version>) -> Value {
        let mut object = json!({
            "cniVersion": version.unwrap_or(Version::LATEST).as_str(),
            "code": self.code,
            "msg": self.message,
        });
        if !self.details.is_empty() {
            object["details"] = self.details.as_str().into();
        }
        object
    }
}

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if self.details.is_empty() {
            Ok(())
        } else {
            write!(f, ": {}", self.details)
        }
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        let code = match &error {
            StoreError::Locked { .. } | StoreError::Exhausted(_) => code::TRY_AGAIN_LATER,
            StoreError::Taken { .. } | StoreError::NotInRange(_) => code::ADDRESS_UNAVAILABLE,
            StoreError::BadName(_) => code::INVALID_ENVIRONMENT,
            _ => code::IO,
        };
        Self::new(code, error.to_string())
    }
}

impl From<NetError> for Error {
    fn from(error: NetError) -> Self {
        let code = match &error {
            NetError::NetNs { .. } => code::INVALID_NETNS,
            NetError::Exists(_) => code::INTERFACE_EXISTS,
            _ => code::KERNEL,
        };
        Self::new(code, error.to_string())
    }
}

impl From<ClientError> for Error {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused(error) => {
                Self::new(error.code, format!("the agent refused: {}", error.message))
                    .details(error.details)
            }
            error => Self::new(code::TRY_AGAIN_LATER, "the Hachi agent does not answer")
                .details(format!("{error}; is hachi-agent running on this node?")),
        }
    }
}
