//! The other end of many connections: each is answered with the number that it says, and held.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    time::Duration,
};

use anyhow::{Context as _, Result};

/// How long a connection may take to say its number.
const WAIT: Duration = Duration::from_secs(20);

/// What to hold.
#[derive(Debug, clap::Args)]
pub struct Hold {
    /// Where to listen, as ADDRESS:PORT.
    pub address: SocketAddr,
    /// How many connections to take in before the list of them is printed.
    #[arg(long)]
    pub count: usize,
}

impl Hold {
    /// Prints the address that it listens at, and once all have come, on one line, where each came from.
    /// Holds them until its input ends.
    ///
    /// # Errors
    /// If a connection cannot be taken in or says nothing.
    pub fn run(self) -> Result<()> {
        let listener = TcpListener::bind(self.address)
            .with_context(|| format!("listen on tcp/{}", self.address))?;
        println!("{}", listener.local_addr()?);
        let mut held = Vec::with_capacity(self.count);
        let mut peers = Vec::with_capacity(self.count);
        while held.len() < self.count {
            let (mut stream, peer) = listener.accept().context("a connection")?;
            stream.set_read_timeout(Some(WAIT))?;
            let mut number = [0; 4];
            stream
                .read_exact(&mut number)
                .with_context(|| format!("the number of {peer}"))?;
            stream.write_all(&number)?;
            held.push(stream);
            peers.push(peer.to_string());
        }
        println!("{}", peers.join(" "));
        io::copy(&mut io::stdin(), &mut io::sink())?;
        Ok(())
    }
}
