//! Watches as response bodies: one JSON event a line, bookmarks in between, an error at the end.

use std::{
    convert::Infallible,
    time::{Duration, Instant},
};

use futures::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Bytes, Frame};

use super::{
    Call, Service,
    reply::{self, Body, Reply},
    selector::Selector,
};
use crate::{
    Resource,
    failure::{Cause, Failure},
    store::{Change, Event, Since, Watch},
};

/// A real API server picks between 30 and 60 minutes where the client gives no limit.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// Events are joined into writes of about this size when many are waiting.
const BATCH: usize = 64 << 10;

struct State {
    watch: Watch,
    resource: &'static Resource,
    selector: Selector,
    format: reply::Format,
    /// How often to send a bookmark, if at all.
    bookmarks: Option<Duration>,
    next_bookmark: Instant,
    /// Whether the end of the initial events is yet to be told.
    initial: bool,
    first: bool,
    end: Instant,
    ended: bool,
}

/// Opens a watch.
pub(super) fn open(service: &Service, call: &Call, selector: Selector) -> Result<Reply, Failure> {
    let query = &call.query;
    let resource = call.path.resource;
    let initial = query.flag("sendInitialEvents");
    if !query.get("sendInitialEvents").is_empty()
        && query.get("resourceVersionMatch") != "NotOlderThan"
    {
        let why = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
        let cause = Cause::forbidden("resourceVersionMatch", why);
        return Err(Failure::bad_options("ListOptions", cause));
    }
    let since = match query.number("resourceVersion")? {
        _ if initial => Since::Start,
        None | Some(0) if query.get("sendInitialEvents").is_empty() => Since::Start,
        None | Some(0) => Since::Now,
        Some(version) => Since::Version(version),
    };
    let bookmarks = query
        .flag("allowWatchBookmarks")
        .then_some(service.bookmarks);
    let timeout = query
        .number("timeoutSeconds")?
        .map_or(TIMEOUT, Duration::from_secs);
    let now = Instant::now();
    let watch = match service.store.watch(resource, since) {
        // Too old is what the watch tells, not what refuses it.
        Err(failure) if failure.code == 410 => return Ok(Reply::json(200, reply::error(&failure))),
        watch => watch?,
    };
    let state = State {
        watch,
        resource,
        selector,
        format: call.format,
        bookmarks,
        next_bookmark: now + service.bookmarks,
        initial: initial && bookmarks.is_some(),
        first: true,
        end: now + timeout.min(TIMEOUT),
        ended: false,
    };
    let frames = stream::unfold(state, |mut state| async move {
        let bytes = state.next().await?;
        Some((Ok::<_, Infallible>(Frame::data(bytes)), state))
    });
    let body: Body = StreamBody::new(frames).boxed_unsync();
    Ok(Reply::stream(body))
}

impl State {
    /// The next bytes to send; `None` at the end.
    async fn next(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        loop {
            if let Some(bytes) = self.waiting() {
                return Some(bytes);
            }
            let now = Instant::now();
            // However late it is: a list that is not told to be over is none.
            let end = std::mem::take(&mut self.initial);
            if !end && now >= self.end {
                return None;
            }
            if end || self.bookmarks.is_some() && now >= self.next_bookmark {
                self.next_bookmark = now + self.bookmarks.unwrap_or(TIMEOUT);
                return Some(
                    self.format
                        .bookmark(self.resource, self.watch.position(), end),
                );
            }
            let wake = if self.bookmarks.is_some() {
                self.end.min(self.next_bookmark)
            } else {
                self.end
            };
            if let Ok(event) = tokio::time::timeout_at(wake.into(), self.watch.next()).await {
                match event {
                    Ok(event) => {
                        if let Some(bytes) = self.render(&event) {
                            return Some(bytes);
                        }
                    }
                    Err(failure) => return Some(self.fail(&failure)),
                }
            }
        }
    }

    /// The events that are there already, as one piece.
    fn waiting(&mut self) -> Option<Bytes> {
        let mut joined: Vec<u8> = Vec::new();
        while joined.len() < BATCH {
            match self.watch.ready() {
                Ok(Some(event)) => {
                    if let Some(bytes) = self.render(&event) {
                        joined.extend_from_slice(&bytes);
                    }
                }
                Ok(None) => break,
                Err(failure) => {
                    let error = self.fail(&failure);
                    joined.extend_from_slice(&error);
                    break;
                }
            }
        }
        (!joined.is_empty()).then(|| joined.into())
    }

    /// An event as the selector sees it: objects come into view and go out of it.
    fn render(&mut self, event: &Event) -> Option<Bytes> {
        let is = self.selector.matches(&event.object);
        let was = event
            .previous
            .as_ref()
            .is_some_and(|before| self.selector.matches(before));
        let change = match (event.change, was, is) {
            (Change::Added, _, true) => Change::Added,
            (Change::Modified, true, true) => Change::Modified,
            (Change::Modified, false, true) => Change::Added,
            (Change::Modified, true, false) => Change::Deleted,
            (Change::Deleted, true, _) => Change::Deleted,
            _ => return None,
        };
        let first = std::mem::take(&mut self.first);
        Some(
            self.format
                .event(self.resource, change, &event.object, first),
        )
    }

    fn fail(&mut self, failure: &Failure) -> Bytes {
        self.ended = true;
        reply::error(failure)
    }
}
