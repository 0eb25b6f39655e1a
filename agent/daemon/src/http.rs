//! Health and metrics over HTTP: `/healthz` and `/livez` (the main task answers), `/readyz` (an
//! ADD can be served), `/metrics` (Prometheus text format 0.0.4).

use std::{convert::Infallible, fmt::Write as _, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};
use hachi_api::{Reply, Request, Status, Table};
use http_body_util::Full;
use hyper::{Response, StatusCode, body::Bytes, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::mpsc};
use tracing::{debug, info, warn};

use crate::agent::Ask;

/// Longer than any write to the kernel takes; beyond it the agent counts as hung.
const PATIENCE: Duration = Duration::from_secs(5);

/// Binds the address and serves it until the process ends.
pub(crate) async fn start(address: SocketAddr, asks: mpsc::Sender<Ask>) -> Result<()> {
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
            let asks = asks.clone();
            tokio::spawn(async move {
                let service = service_fn(move |request: hyper::Request<_>| {
                    let asks = asks.clone();
                    async move { Ok::<_, Infallible>(answer(&asks, request.uri().path()).await) }
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

async fn ask(asks: &mpsc::Sender<Ask>, request: Request) -> Option<Reply> {
    tokio::time::timeout(PATIENCE, crate::ask(asks.clone(), request))
        .await
        .ok()
}

async fn answer(asks: &mpsc::Sender<Ask>, path: &str) -> Response<Full<Bytes>> {
    if !["/healthz", "/livez", "/readyz", "/metrics"].contains(&path) {
        return text(
            StatusCode::NOT_FOUND,
            "healthz, livez, readyz or metrics\n".into(),
        );
    }
    let Some(Reply::Status { status }) = ask(asks, Request::Status).await else {
        return text(
            StatusCode::SERVICE_UNAVAILABLE,
            "the agent does not answer\n".into(),
        );
    };
    match path {
        "/metrics" => match ask(
            asks,
            Request::Get {
                table: Table::Counters,
            },
        )
        .await
        {
            Some(Reply::Table { rows, .. }) => text(StatusCode::OK, metrics(&status, &rows)),
            _ => text(
                StatusCode::SERVICE_UNAVAILABLE,
                "the counters are not readable\n".into(),
            ),
        },
        "/readyz" if !status.ready => text(
            StatusCode::SERVICE_UNAVAILABLE,
            status.problems.join("\n") + "\n",
        ),
        _ => text(StatusCode::OK, "ok\n".into()),
    }
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

/// `counters` are the rows of [`Table::Counters`]: reason, verdict, packets, bytes.
fn metrics(status: &Status, counters: &[Vec<String>]) -> String {
    let mut out = String::new();
    let mut family = |name: &str, kind: &str, help: &str, samples: Vec<(String, String)>| {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(out, "{name}{labels} {value}");
        }
    };
    family(
        "hachi_ready",
        "gauge",
        "Whether an ADD can be served.",
        vec![(String::new(), u8::from(status.ready).to_string())],
    );
    family(
        "hachi_endpoints",
        "gauge",
        "Pods of this node.",
        vec![(String::new(), status.endpoints.to_string())],
    );
    family(
        "hachi_policy_revision",
        "gauge",
        "Policy revision in the kernel.",
        vec![(String::new(), status.revision.to_string())],
    );
    let conntrack = &status.conntrack;
    for (name, help, value) in [
        (
            "hachi_conntrack_expired_total",
            "Entries of conntrack that were deleted because no packet came.",
            conntrack.expired,
        ),
        (
            "hachi_conntrack_moved_total",
            "Entries of conntrack that were deleted because their backend was removed.",
            conntrack.moved,
        ),
        (
            "hachi_sockets_closed_total",
            "Connected UDP sockets that were closed because their backend was removed.",
            conntrack.sockets_closed,
        ),
    ] {
        family(
            name,
            "counter",
            help,
            vec![(String::new(), value.to_string())],
        );
    }
    let per_map = |value: fn(&hachi_api::MapUse) -> u32| {
        status
            .maps
            .iter()
            .map(|(map, used)| (format!("{{map=\"{map}\"}}"), value(used).to_string()))
            .collect()
    };
    family(
        "hachi_map_entries",
        "gauge",
        "Entries of a map.",
        per_map(|m| m.entries),
    );
    family(
        "hachi_map_capacity",
        "gauge",
        "Entries of a map at most.",
        per_map(|m| m.capacity),
    );
    let per_reason = |column: usize| {
        counters
            .iter()
            .filter(|row| row.len() > column)
            .map(|row| {
                (
                    format!("{{reason=\"{}\",verdict=\"{}\"}}", row[0], row[1]),
                    row[column].clone(),
                )
            })
            .collect()
    };
    family(
        "hachi_packets_total",
        "counter",
        "Packets by outcome.",
        per_reason(2),
    );
    family(
        "hachi_bytes_total",
        "counter",
        "Bytes by outcome.",
        per_reason(3),
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_have_a_type_and_every_reason() {
        let rows = vec![
            ["policy_ingress", "dropped", "3", "180"]
                .map(String::from)
                .to_vec(),
        ];
        let text = metrics(
            &Status {
                ready: true,
                endpoints: 2,
                ..Status::default()
            },
            &rows,
        );
        assert!(
            text.contains("# TYPE hachi_packets_total counter\n"),
            "{text}"
        );
        assert!(
            text.contains("hachi_packets_total{reason=\"policy_ingress\",verdict=\"dropped\"} 3\n"),
            "{text}"
        );
        assert!(text.contains("\nhachi_endpoints 2\n"), "{text}");
        assert!(text.contains("\nhachi_conntrack_moved_total 0\n"), "{text}");
    }
}
