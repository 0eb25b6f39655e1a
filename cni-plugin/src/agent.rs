//! The calls to the agent.

use std::{net::IpAddr, time::Duration};

use hachi_api::{Attachment, AttachmentId, Client, ClientError, PodRef, Reply, Request, Status};
use ipnet::IpNet;

use crate::{
    conf::{AgentMode, Conf},
    error::Error,
};

/// An ADD waits in the agent until the API server has shown the Pod.
const ADD: Duration = Duration::from_secs(30);
/// Anything else.
const OTHER: Duration = Duration::from_secs(10);

/// The agent of this node.
#[derive(Debug)]
pub(crate) struct Agent(Client);

impl Agent {
    /// Connects; `None` if there is none and the configuration does not insist.
    pub(crate) fn connect(conf: &Conf) -> Result<Option<Self>, Error> {
        match (Client::connect(&conf.socket), conf.agent) {
            (Ok(client), _) => Ok(Some(Self(client))),
            (Err(_), AgentMode::Optional) => Ok(None),
            (Err(error), AgentMode::Required) => Err(error.into()),
        }
    }

    /// Connects if there is somebody.
    pub(crate) fn find(conf: &Conf) -> Option<Self> {
        Client::connect(&conf.socket).ok().map(Self)
    }

    /// The node's blocks of addresses, and the MTU of its Pods.
    pub(crate) fn pool(&mut self) -> Result<(Vec<IpNet>, u32), Error> {
        match self.0.call_within(&Request::Pool, OTHER)? {
            Reply::Pool { cidrs, mtu } => Ok((cidrs, mtu)),
            other => Err(unexpected(other)),
        }
    }

    /// The addresses that a Pod asks for in its annotation; waits until the agent knows the Pod.
    pub(crate) fn wanted_addresses(&mut self, pod: &PodRef) -> Result<Vec<IpAddr>, Error> {
        let request = Request::Pod { pod: pod.clone() };
        match self.0.call_within(&request, ADD)? {
            Reply::Pod { addresses } => Ok(addresses),
            other => Err(unexpected(other)),
        }
    }

    pub(crate) fn status(&mut self) -> Result<Status, Error> {
        match self.0.call_within(&Request::Status, OTHER)? {
            Reply::Status { status } => Ok(*status),
            other => Err(unexpected(other)),
        }
    }

    pub(crate) fn add(&mut self, attachment: Attachment) -> Result<(), Error> {
        Ok(self.0.perform(&Request::AddEndpoint { attachment }, ADD)?)
    }

    pub(crate) fn check(&mut self, id: &AttachmentId) -> Result<(), Error> {
        let request = Request::CheckEndpoint {
            attachment: id.clone(),
        };
        Ok(self.0.perform(&request, OTHER)?)
    }

    pub(crate) fn gc(&mut self, valid: Vec<AttachmentId>) -> Result<(), Error> {
        Ok(self.0.perform(&Request::Gc { valid }, OTHER)?)
    }

    /// Says that an endpoint goes; its answer is waited for by [`Agent::deleted`].
    pub(crate) fn delete(&mut self, id: &AttachmentId) -> Result<(), Error> {
        Ok(self.0.send(&Request::DeleteEndpoint {
            attachment: id.clone(),
        })?)
    }

    /// Waits for the answer to [`Agent::delete`].
    pub(crate) fn deleted(&mut self) -> Result<(), Error> {
        Ok(self.0.receive_done(OTHER)?)
    }
}

fn unexpected(reply: Reply) -> Error {
    match reply {
        Reply::Error { error } => ClientError::Refused(error).into(),
        other => ClientError::Garbled(format!("an answer to another question: {other:?}")).into(),
    }
}
