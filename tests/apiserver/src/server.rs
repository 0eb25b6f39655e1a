//! The running server: its thread, its listeners, and the handle that its owner holds.
//!
//! Everything runs on one thread with a runtime of its own, so an owner needs no runtime, and the
//! end of the thread is the end of every connection.

use std::{
    collections::BTreeSet,
    net::{SocketAddr, TcpListener},
    path::Path,
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tracing::{debug, warn};

use crate::{
    Config, StartError, Store,
    alloc::Ranges,
    config::Grant,
    controllers,
    http::{Access, Service},
    tls,
};

/// Starts servers.
#[derive(Debug)]
pub struct Server;

impl Server {
    /// Starts a server, which runs until its handle is shut down or dropped.
    ///
    /// # Errors
    /// Settings that contradict themselves, and listeners that cannot be used.
    pub fn start(mut config: Config) -> Result<Handle, StartError> {
        let ranges = Ranges::new(&config)?;
        let listeners = std::mem::take(&mut config.listeners);
        let mut addresses = Vec::new();
        for listener in &listeners {
            listener.set_nonblocking(true)?;
            addresses.push(listener.local_addr()?);
        }
        if config.advertise.is_empty() {
            config.advertise.clone_from(&addresses);
        }
        let identity = tls::identity(&names(&config, &addresses, &ranges))?;
        let token = tls::token()?;
        let store = Store::new(ranges, config.history, config.kubelets);
        controllers::bootstrap(&store, &config);

        let grants = std::mem::take(&mut config.grants);
        let access = Access::new(&token, grants);
        let service = Arc::new(Service {
            store: store.clone(),
            access,
            bookmarks: config.bookmarks,
        });
        let (stop, stopped) = watch::channel(());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let acceptor = TlsAcceptor::from(identity.tls);
        let controlled = store.clone();
        let thread = std::thread::Builder::new()
            .name("apiserver".into())
            .spawn(move || {
                runtime.block_on(run(listeners, acceptor, service, controlled, stopped));
            })?;
        Ok(Handle {
            addresses,
            ca_pem: identity.ca_pem,
            token,
            store,
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

/// A running server. Dropping it stops the server.
#[derive(Debug)]
pub struct Handle {
    /// Where the server listens, in the order of the configuration's listeners.
    pub addresses: Vec<SocketAddr>,
    /// The certificate of the authority to trust, as PEM.
    pub ca_pem: String,
    /// The administrator's bearer token.
    pub token: String,
    /// The cluster's objects.
    pub store: Store,
    stop: Option<watch::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    /// The text of a kubeconfig for a client that reaches the server at an address.
    #[must_use]
    pub fn kubeconfig(&self, server: SocketAddr) -> String {
        tls::kubeconfig(server, &self.ca_pem, &self.token)
    }

    /// [`Handle::kubeconfig`] with the token of a [`Grant`].
    #[must_use]
    pub fn kubeconfig_for(&self, server: SocketAddr, grant: &Grant) -> String {
        tls::kubeconfig(server, &self.ca_pem, &grant.token)
    }

    /// Writes a kubeconfig as a file that only its owner may read.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_kubeconfig(&self, server: SocketAddr, path: &Path) -> std::io::Result<()> {
        tls::write_private(path, &self.kubeconfig(server))
    }

    /// Stops the server and waits for its end; the store stays readable.
    pub fn shutdown(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the API server's thread has panicked");
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.end();
    }
}

/// Every name and address that a client may know the server by.
fn names(config: &Config, addresses: &[SocketAddr], ranges: &Ranges) -> BTreeSet<String> {
    let mut names: BTreeSet<String> = config.names.iter().cloned().collect();
    for name in [
        "localhost",
        "127.0.0.1",
        "::1",
        "kubernetes",
        "kubernetes.default.svc",
    ] {
        names.insert(name.into());
    }
    let known = addresses
        .iter()
        .chain(&config.advertise)
        .map(SocketAddr::ip);
    names.extend(
        known
            .chain(ranges.first_ips())
            .map(|address| address.to_string()),
    );
    names
}

async fn run(
    listeners: Vec<TcpListener>,
    acceptor: TlsAcceptor,
    service: Arc<Service>,
    store: Store,
    mut stopped: watch::Receiver<()>,
) {
    controllers::spawn(&store);
    for listener in listeners {
        let (acceptor, service) = (acceptor.clone(), Arc::clone(&service));
        tokio::spawn(accept(listener, acceptor, service));
    }
    // An error means that the sender is gone, which is the signal to stop. The runtime drops
    // every task when this returns, and connections with them.
    while stopped.changed().await.is_ok() {}
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, service: Arc<Service>) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            warn!(%error, "a listener cannot be used");
            return;
        }
    };
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let (acceptor, service) = (acceptor.clone(), Arc::clone(&service));
                tokio::spawn(async move {
                    if let Err(error) = serve(stream, acceptor, service).await {
                        debug!(%peer, %error, "a connection ended");
                    }
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn serve(
    stream: tokio::net::TcpStream,
    acceptor: TlsAcceptor,
    service: Arc<Service>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    // Watch events are small and must not wait for an acknowledgement.
    stream.set_nodelay(true)?;
    let stream = acceptor.accept(stream).await?;
    let answer = hyper::service::service_fn(move |request| {
        let service = Arc::clone(&service);
        async move { service.answer(request).await }
    });
    auto::Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(stream), answer)
        .await
}
