//! What a range remembers: how far it has been used up, and which addresses were freed, oldest
//! first. One file a range, of lines of equal length, so that every step reads and writes one line:
//!
//! ```text
//! next 10.244.1.9 head 2          addresses from here on were never given out
//! 10.244.1.4                      (taken again: before head)
//! 10.244.1.7                      (taken again)
//! 10.244.1.3                      freed longest ago: the next one, once `next` is at the end
//! ```
//! Nothing here is the truth about an address (that is the file under `addresses/`): an entry that
//! is wrong, because its writer was killed, is skipped, and one that is missing is found again when
//! the range seems full.

use std::{
    fs::{self, File, OpenOptions},
    net::IpAddr,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use super::{
    StoreError,
    range::{Bounds, number},
};

/// Length of the first line.
const HEADER: u64 = 64;
/// Entries before `head` are dropped when there are this many, and more than live ones.
const COMPACT: u64 = 4096;
/// Written in place of an address once every address was given out.
const USED_UP: &str = "-";

/// The open state of one range. Used under the store's lock only.
pub(super) struct State {
    path: PathBuf,
    file: File,
    bounds: Bounds,
    /// The first address that was never given out.
    next: Option<IpAddr>,
    /// Entries already taken.
    head: u64,
    /// Entries in the file.
    count: u64,
}

impl State {
    /// Opens the state of a range, which starts out unused.
    pub(super) fn open(dir: &Path, bounds: Bounds) -> Result<Self, StoreError> {
        let path = dir.join(bounds.file_name());
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(StoreError::io("open", &path))?;
        let mut state = Self {
            path,
            file,
            bounds,
            next: Some(bounds.start),
            head: 0,
            count: 0,
        };
        let length = state
            .file
            .metadata()
            .map_err(StoreError::io("read", &state.path))?
            .len();
        if length < HEADER {
            state.save()?;
            return Ok(state);
        }
        let mut header = [0; HEADER as usize];
        state
            .file
            .read_exact_at(&mut header, 0)
            .map_err(StoreError::io("read", &state.path))?;
        // A header that is not understood means "unused": every address is looked at again.
        if let Some((next, head)) = parse_header(&header) {
            state.count = (length - HEADER) / state.width();
            state.head = head.min(state.count);
            state.next = next;
        }
        Ok(state)
    }

    /// The first address that was never given out.
    pub(super) fn next(&self) -> Option<IpAddr> {
        self.next
    }

    /// Whether the address was given out at some time, or passed over.
    pub(super) fn passed(&self, address: IpAddr) -> bool {
        self.next.is_none_or(|next| number(address) < number(next))
    }

    /// Everything before `next` has been given out or passed over.
    pub(super) fn set_next(&mut self, next: Option<IpAddr>) {
        self.next = next;
    }

    /// The freed address at this place in the queue, 0 being the oldest.
    pub(super) fn freed(&self, place: u64) -> Result<Option<Freed>, StoreError> {
        let index = self.head + place;
        if index >= self.count {
            return Ok(None);
        }
        let mut line = vec![0; self.line_length()];
        let offset = HEADER + index * self.width();
        self.file
            .read_exact_at(&mut line, offset)
            .map_err(StoreError::io("read", &self.path))?;
        let address = std::str::from_utf8(&line)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        // Anything else than an address of this range is a damaged line.
        Ok(Some(
            match address.filter(|address| self.bounds.contains(*address)) {
                Some(address) => Freed::Address(address),
                None => Freed::Damaged,
            },
        ))
    }

    /// The oldest `number` entries are used.
    pub(super) fn take(&mut self, number: u64) {
        self.head = (self.head + number).min(self.count);
    }

    /// Appends an address that has become free.
    pub(super) fn push(&mut self, address: IpAddr) -> Result<(), StoreError> {
        let mut line = address.to_string().into_bytes();
        line.resize(self.line_length() - 1, b' ');
        line.push(b'\n');
        let offset = HEADER + self.count * self.width();
        self.file
            .write_all_at(&line, offset)
            .map_err(StoreError::io("write", &self.path))?;
        self.count += 1;
        Ok(())
    }

    /// Forgets every freed address; `next` is set anew, so that all are looked at again.
    pub(super) fn restart(&mut self, next: Option<IpAddr>) {
        self.head = self.count;
        self.next = next;
    }

    /// Writes `next` and `head`.
    pub(super) fn save(&mut self) -> Result<(), StoreError> {
        if self.count > 0 && self.head == self.count {
            self.clear()?;
        } else if self.head >= COMPACT && self.head > self.count / 2 {
            self.compact()?;
        }
        let header = header(self.next, self.head);
        self.file
            .write_all_at(&header, 0)
            .map_err(StoreError::io("write", &self.path))
    }

    fn clear(&mut self) -> Result<(), StoreError> {
        // Shortened before the header is written: in between `head` is beyond the end, which reads
        // as "nothing".
        self.file
            .set_len(HEADER)
            .map_err(StoreError::io("shorten", &self.path))?;
        self.head = 0;
        self.count = 0;
        Ok(())
    }

    fn compact(&mut self) -> Result<(), StoreError> {
        let mut bytes = header(self.next, 0).to_vec();
        let begin = HEADER + self.head * self.width();
        let live = (self.count - self.head) * self.width();
        let length = bytes.len();
        bytes.resize(length + usize::try_from(live).unwrap_or(0), 0);
        self.file
            .read_exact_at(&mut bytes[length..], begin)
            .map_err(StoreError::io("read", &self.path))?;
        let mut fresh = self.path.clone().into_os_string();
        fresh.push(".new");
        fs::write(&fresh, &bytes).map_err(StoreError::io("write", &fresh))?;
        fs::rename(&fresh, &self.path).map_err(StoreError::io("replace", &self.path))?;
        self.file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.path)
            .map_err(StoreError::io("open", &self.path))?;
        self.count -= self.head;
        self.head = 0;
        Ok(())
    }

    /// Divides the page size, so that no line is ever written by halves.
    fn width(&self) -> u64 {
        if self.bounds.start.is_ipv4() { 16 } else { 64 }
    }

    fn line_length(&self) -> usize {
        if self.bounds.start.is_ipv4() { 16 } else { 64 }
    }
}

/// A line of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Freed {
    Address(IpAddr),
    Damaged,
}

fn header(next: Option<IpAddr>, head: u64) -> [u8; HEADER as usize] {
    let next = next.map_or_else(|| USED_UP.to_owned(), |address| address.to_string());
    let mut line = [b' '; HEADER as usize];
    let text = format!("next {next} head {head}");
    let used = text.len().min(line.len() - 1);
    line[..used].copy_from_slice(&text.as_bytes()[..used]);
    line[line.len() - 1] = b'\n';
    line
}

fn parse_header(line: &[u8]) -> Option<(Option<IpAddr>, u64)> {
    let text = std::str::from_utf8(line).ok()?;
    let mut words = text.split_whitespace();
    let mut value = |name: &str| (words.next()? == name).then(|| words.next())?;
    let next = match value("next")? {
        USED_UP => None,
        address => Some(address.parse().ok()?),
    };
    Some((next, value("head")?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounds() -> Bounds {
        Bounds {
            start: "10.0.0.2".parse().unwrap(),
            end: "10.0.0.9".parse().unwrap(),
        }
    }

    fn ip(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    #[test]
    fn queue_is_first_in_first_out_across_openings() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = State::open(dir.path(), bounds()).unwrap();
        assert_eq!(state.next(), Some(ip(2)));
        for last in [5, 3, 9] {
            state.push(ip(last)).unwrap();
        }
        state.set_next(None);
        state.take(1);
        state.save().unwrap();
        let mut state = State::open(dir.path(), bounds()).unwrap();
        assert_eq!(state.next(), None);
        assert_eq!(state.freed(0).unwrap(), Some(Freed::Address(ip(3))));
        assert_eq!(state.freed(1).unwrap(), Some(Freed::Address(ip(9))));
        assert_eq!(state.freed(2).unwrap(), None);
        state.take(2);
        state.save().unwrap();
        assert_eq!(
            fs::metadata(dir.path().join("10.0.0.2-10.0.0.9"))
                .unwrap()
                .len(),
            HEADER
        );
    }

    #[test]
    fn the_queue_does_not_grow_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = State::open(dir.path(), bounds()).unwrap();
        state.push(ip(2)).unwrap();
        for turn in 0..20_000u32 {
            let last = 3 + u8::try_from(turn % 7).unwrap();
            state.push(ip(last)).unwrap();
            state.take(1);
            state.save().unwrap();
            assert_eq!(state.freed(0).unwrap(), Some(Freed::Address(ip(last))));
        }
        let length = fs::metadata(dir.path().join("10.0.0.2-10.0.0.9"))
            .unwrap()
            .len();
        assert!(length < HEADER + 16 * (COMPACT + 2), "{length}");
    }

    #[test]
    fn damage_is_seen_and_survived() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(bounds().file_name());
        let mut state = State::open(dir.path(), bounds()).unwrap();
        state.push(ip(4)).unwrap();
        state.save().unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes[HEADER as usize] = b'x';
        fs::write(&path, &bytes).unwrap();
        let state = State::open(dir.path(), bounds()).unwrap();
        assert_eq!(state.freed(0).unwrap(), Some(Freed::Damaged));
        fs::write(&path, "garbage").unwrap();
        assert_eq!(
            State::open(dir.path(), bounds()).unwrap().next(),
            Some(ip(2))
        );
    }

    #[test]
    fn the_longest_header_fits() {
        let next: IpAddr = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff".parse().unwrap();
        let line = header(Some(next), 999_999_999_999);
        assert_eq!(parse_header(&line), Some((Some(next), 999_999_999_999)));
    }
}
