//! Health and metrics over HTTP: `/healthz` and `/livez` (the main task answers), `/readyz` (an
//! ADD can be served), `/metrics` (Prometheus text format 0.0.4).

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use hachi_kernel::Meter;
use http_body_util::Full;
use hyper::{Response, StatusCode, body::Bytes, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
};
use tracing::{debug, info, warn};

use crate::{agent::Ask, metrics};

/// Longer than any write to the kernel takes; beyond it the agent counts as hung.
const PATIENCE: Duration = Duration::from_secs(5);

/// Binds the address and serves it until the process ends.
pub(crate) async fn start(
    address: SocketAddr,
    asks: mpsc::Sender<Ask>,
    meter: Meter,
) -> Result<()> {
    let meter = Arc::new(meter);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address} (--http)"))?;
    info!(%address, "serving health and metrics");
    tokio::spawn(async move {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!(%error, "cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (asks, meter) = (asks.clone(), Arc::clone(&meter));
            tokio::spawn(async move {
                let service = service_fn(move |request: hyper::Request<_>| {
                    let (asks, meter) = (asks.clone(), Arc::clone(&meter));
                    async move {
                        let path = request.uri().path();
                        Ok::<_, Infallible>(answer(&asks, &meter, path).await)
                    }
                });
                let served = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(PATIENCE)
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
                if let Err(error) = served {
                    debug!(%error, "connection ended");
                }
            });
        }
    });
    Ok(())
}

/// Whether an ADD can be served, or what is in the way; `None` if the main task does not answer.
pub(crate) async fn ready(asks: &mpsc::Sender<Ask>) -> Option<Result<(), String>> {
    ask(asks, Ask::Ready).await
}

async fn ask<T>(
    asks: &mpsc::Sender<Ask>,
    what: impl FnOnce(oneshot::Sender<T>) -> Ask,
) -> Option<T> {
    let (reply, answer) = oneshot::channel();
    let asked = async {
        asks.send(what(reply)).await.ok()?;
        answer.await.ok()
    };
    tokio::time::timeout(PATIENCE, asked).await.ok().flatten()
}

async fn answer(asks: &mpsc::Sender<Ask>, meter: &Arc<Meter>, path: &str) -> Response<Full<Bytes>> {
    let silent = || {
        let why = "the agent does not answer\n".into();
        text(StatusCode::SERVICE_UNAVAILABLE, why)
    };
    let ok = || text(StatusCode::OK, "ok\n".into());
    match path {
        "/healthz" | "/livez" => ready(asks).await.map_or_else(silent, |_| ok()),
        "/readyz" => match ready(asks).await {
            None => silent(),
            Some(Ok(())) => ok(),
            Some(Err(why)) => text(StatusCode::SERVICE_UNAVAILABLE, why + "\n"),
        },
        "/metrics" => {
            let Some(sample) = ask(asks, Ask::Sample).await else {
                return silent();
            };
            // Maps that programs fill are counted by reading them: not on a thread that serves.
            let meter = Arc::clone(meter);
            let counting = tokio::task::spawn_blocking(move || count(&meter));
            let (maps, programs) = counting.await.unwrap_or_default();
            text(StatusCode::OK, metrics::text(&sample, &maps, &programs))
        }
        _ => text(
            StatusCode::NOT_FOUND,
            "healthz, livez, readyz or metrics\n".into(),
        ),
    }
}

/// What is counted in the kernel; nothing of what cannot be read.
fn count(meter: &Meter) -> (metrics::Maps, metrics::Programs) {
    let maps = meter.map_use().unwrap_or_else(|error| {
        warn!(%error, "the maps are not readable");
        metrics::Maps::new()
    });
    let programs = meter.attached().unwrap_or_else(|error| {
        warn!(%error, "the pins are not readable");
        metrics::Programs::new()
    });
    (maps, programs)
}

fn text(code: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = code;
    response.headers_mut().insert(
        hyper::header::CONTENT_TYPE,
        hyper::header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"),
    );
    response
}
