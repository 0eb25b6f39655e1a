//! The token of a service account: the kubelet writes a new one long before the last expires, so the file
//! is read again every minute, by a clock that nobody sets, and at once when the server refuses it.

use std::{
    fs,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use hyper::{
    Request, Response, StatusCode,
    header::{AUTHORIZATION, HeaderValue},
};
use tower::{BoxError, Layer, Service};
use tracing::warn;

/// How long what was read counts.
const FRESH: Duration = Duration::from_secs(60);

/// Adds the token to requests.
#[derive(Clone, Debug)]
pub(super) struct TokenLayer(Arc<Token>);

impl TokenLayer {
    /// # Errors
    /// If the file cannot be read, or what is in it cannot be part of a header.
    pub(super) fn new(path: PathBuf) -> Result<Self> {
        let header =
            read(&path).with_context(|| format!("cannot use the token {}", path.display()))?;
        let known = Mutex::new(Known {
            header,
            until: Instant::now() + FRESH,
        });
        Ok(Self(Arc::new(Token { path, known })))
    }
}

impl<S> Layer<S> for TokenLayer {
    type Service = WithToken<S>;

    fn layer(&self, inner: S) -> Self::Service {
        WithToken {
            inner,
            token: Arc::clone(&self.0),
        }
    }
}

#[derive(Debug)]
struct Token {
    path: PathBuf,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    header: HeaderValue,
    /// When the file is to be read again.
    until: Instant,
}

impl Token {
    /// The header at `now`. A file that cannot be read leaves the last one in use: some take tokens away
    /// once they are read (kubernetes/kubernetes#68164).
    fn header(&self, now: Instant) -> HeaderValue {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if now >= known.until {
            match read(&self.path) {
                Ok(header) => known.header = header,
                Err(error) => {
                    warn!(path = %self.path.display(), error = format!("{error:#}"),
                        "the token cannot be read; the last one stays in use");
                }
            }
            known.until = now + FRESH;
        }
        known.header.clone()
    }

    /// The server has refused this header: the next request reads the file, unless that has been done.
    fn refused(&self, header: &HeaderValue, now: Instant) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.header == *header {
            known.until = now;
        }
    }
}

fn read(path: &PathBuf) -> Result<HeaderValue> {
    let text = fs::read_to_string(path)?;
    let mut header = HeaderValue::try_from(format!("Bearer {}", text.trim()))
        .context("it is no token: it has characters that a header may not have")?;
    header.set_sensitive(true);
    Ok(header)
}

/// A service whose requests have the token.
#[derive(Clone, Debug)]
pub(super) struct WithToken<S> {
    inner: S,
    token: Arc<Token>,
}

type Answer<T> = Pin<Box<dyn Future<Output = Result<Response<T>, BoxError>> + Send>>;

impl<S, B, T> Service<Request<B>> for WithToken<S>
where
    S: Service<Request<B>, Response = Response<T>>,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
{
    type Response = Response<T>;
    type Error = BoxError;
    type Future = Answer<T>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let token = Arc::clone(&self.token);
        let header = token.header(Instant::now());
        request.headers_mut().insert(AUTHORIZATION, header.clone());
        let answered = self.inner.call(request);
        Box::pin(async move {
            let response = answered.await.map_err(Into::into)?;
            if response.status() == StatusCode::UNAUTHORIZED {
                token.refused(&header, Instant::now());
            }
            Ok(response)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use tower::{ServiceExt as _, service_fn};

    use super::*;

    fn written(text: &str) -> (tempfile::TempDir, PathBuf, TokenLayer) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("token");
        fs::write(&path, text).expect("written");
        let layer = TokenLayer::new(path.clone()).expect("a token");
        (directory, path, layer)
    }

    /// Whatever the wall clock says: only the time that has passed counts.
    #[test]
    fn the_file_is_read_again_after_a_minute() {
        let (_directory, path, layer) = written("one\n");
        fs::write(&path, "two").expect("written");
        let now = Instant::now();
        assert_eq!(layer.0.header(now), "Bearer one");
        assert_eq!(layer.0.header(now + FRESH / 2), "Bearer one");
        assert_eq!(layer.0.header(now + FRESH * 2), "Bearer two");
        fs::remove_file(&path).expect("removed");
        assert_eq!(layer.0.header(now + FRESH * 4), "Bearer two");
    }

    #[test]
    fn what_is_no_token_is_refused_by_name() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("token");
        let error = TokenLayer::new(path.clone()).expect_err("no file");
        assert!(format!("{error:#}").contains("token"), "{error:#}");
        fs::write(&path, "two\nlines").expect("written");
        let error = TokenLayer::new(path).expect_err("no token");
        assert!(format!("{error:#}").contains("it is no token"), "{error:#}");
    }

    /// After a suspend, or a rotation that nobody waited for.
    #[tokio::test]
    async fn a_token_that_the_server_refuses_is_read_again_at_once() {
        let (_directory, path, layer) = written("old");
        let server = service_fn(|request: Request<()>| async move {
            let known = request.headers()[AUTHORIZATION] == "Bearer new";
            let mut response = Response::new(());
            if !known {
                *response.status_mut() = StatusCode::UNAUTHORIZED;
            }
            Ok::<_, Infallible>(response)
        });
        let mut service = layer.layer(server);
        let mut ask = async || {
            let ready = service.ready().await.expect("ready");
            let answered = ready.call(Request::new(())).await.expect("an answer");
            answered.status()
        };
        assert_eq!(ask().await, StatusCode::UNAUTHORIZED);
        fs::write(&path, "new").expect("written");
        assert_eq!(ask().await, StatusCode::OK);
    }
}
