//! The HTTP side: from a request to the store and back.

mod access;
mod discovery;
mod duplicates;
mod protobuf;
mod reply;
mod request;
mod selector;
mod stream;
mod table;
mod verbs;

use std::{convert::Infallible, time::Duration};

use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Bytes, Incoming};
use serde_json::Value;
use tracing::debug;

pub(crate) use self::access::Access;
use self::{
    reply::{Body, Format, Reply},
    request::{Path, Query},
};
use crate::{Store, failure::Failure};

/// No object is larger on a real API server.
const BODY_LIMIT: usize = 3 << 20;

/// Everything that a request is answered from.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) store: Store,
    pub(crate) access: Access,
    /// How often watches get their bookmark.
    pub(crate) bookmarks: Duration,
}

/// A request with its body read.
pub(super) struct Call {
    method: Method,
    path: Path,
    query: Query,
    format: Format,
    content_type: String,
    body: Bytes,
}

impl Service {
    /// Answers a request; failures are answers too.
    pub(crate) async fn answer(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, Infallible> {
        let (method, uri) = (request.method().clone(), request.uri().clone());
        let reply = self.respond(request).await.unwrap_or_else(|failure| {
            debug!(%method, %uri, %failure, "refused");
            Reply::status(&failure)
        });
        Ok(reply.into_response())
    }

    async fn respond(&self, request: Request<Incoming>) -> Result<Reply, Failure> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path();
        let user = self.access.user(&parts.headers)?;
        if let Some(reply) = discovery::open(path) {
            return Ok(reply);
        }
        let resource = Path::parse(path);
        if resource.is_err() {
            user.enter(&parts.method.as_str().to_lowercase(), path)?;
        }
        if let Some(reply) = discovery::document(path, &parts.headers) {
            return if parts.method == Method::GET {
                Ok(reply)
            } else {
                Err(Failure::method_not_allowed())
            };
        }
        if path == "/-/expire" {
            if parts.method != Method::POST {
                return Err(Failure::method_not_allowed());
            }
            self.store.expire();
            return Ok(Reply::text("ok"));
        }
        let path = resource?;
        let query = Query::parse(parts.uri.query().unwrap_or_default());
        user.authorize(path.verb(&parts.method, &query)?, &path)?;
        let header = |name| {
            let value = parts
                .headers
                .get(name)
                .and_then(|value| value.to_str().ok());
            value.unwrap_or_default().to_owned()
        };
        let format = Format::of(&header(http::header::ACCEPT), &query);
        let content_type = header(http::header::CONTENT_TYPE);
        let body = Limited::new(body, BODY_LIMIT)
            .collect()
            .await
            .map_err(|error| {
                Failure::bad_request(format!("the request's body cannot be read: {error}"))
            })?;
        let call = Call {
            method: parts.method,
            path,
            query,
            format,
            content_type,
            body: body.to_bytes(),
        };
        verbs::run(self, &call)
    }
}

impl Call {
    /// The body as JSON, whatever it came as.
    fn json(&self) -> Result<Value, Failure> {
        if self.content_type.starts_with(protobuf::CONTENT_TYPE) {
            return protobuf::decode(&self.body);
        }
        serde_json::from_slice(&self.body).map_err(|error| {
            Failure::bad_request(format!("the request's body is no JSON: {error}"))
        })
    }
}
