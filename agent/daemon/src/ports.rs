//! Ports that programs of this node have open (proc(5), `/proc/net/tcp` and its like): a Service that is
//! given one of them takes what others send there.

use std::{collections::BTreeSet, fs, io};

use hachi_abi::proto;

/// Where the kernel lists sockets of this network namespace, and the state of those that wait for peers:
/// `TCP_LISTEN`; for UDP `TCP_CLOSE`, not connected.
const LISTS: [(&str, u8, &str); 4] = [
    ("/proc/net/tcp", proto::TCP, "0A"),
    ("/proc/net/tcp6", proto::TCP, "0A"),
    ("/proc/net/udp", proto::UDP, "07"),
    ("/proc/net/udp6", proto::UDP, "07"),
];

/// Protocol and port of every socket that waits for peers, but for those on the loopback alone.
pub(crate) fn open() -> io::Result<BTreeSet<(u8, u16)>> {
    let mut all = BTreeSet::new();
    for (path, proto, state) in LISTS {
        match fs::read_to_string(path) {
            Ok(text) => all.extend(
                text.lines()
                    .filter_map(|line| Some((proto, port(line, state)?))),
            ),
            // A kernel without the family.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

/// The local port of a line whose socket is in that state.
fn port(line: &str, state: &str) -> Option<u16> {
    let mut words = line.split_whitespace();
    let (address, port) = words.nth(1)?.split_once(':')?;
    let is_loopback = ["0100007F", "00000000000000000000000001000000"].contains(&address);
    if is_loopback || words.nth(1)? != state {
        return None;
    }
    u16::from_str_radix(port, 16).ok()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn lines_of_the_kernel_are_read() {
        let head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt";
        let line = |address: &str, state: &str| {
            format!("   0: {address} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000")
        };
        assert_eq!(port(head, "0A"), None);
        assert_eq!(port(&line("00000000:7787", "0A"), "0A"), Some(30_599));
        assert_eq!(port(&line("0B001EAC:7787", "0A"), "0A"), Some(30_599));
        assert_eq!(port(&line("0100007F:7787", "0A"), "0A"), None);
        assert_eq!(port(&line("00000000:7787", "01"), "0A"), None);
    }

    #[test]
    fn own_sockets_are_found() {
        let tcp = TcpListener::bind("0.0.0.0:0").unwrap();
        let udp = UdpSocket::bind("0.0.0.0:0").unwrap();
        let local = TcpListener::bind("127.0.0.1:0").unwrap();
        let found = open().unwrap();
        let port = |address: std::net::SocketAddr| address.port();
        assert!(found.contains(&(proto::TCP, port(tcp.local_addr().unwrap()))));
        assert!(found.contains(&(proto::UDP, port(udp.local_addr().unwrap()))));
        assert!(!found.contains(&(proto::TCP, port(local.local_addr().unwrap()))));
    }
}
