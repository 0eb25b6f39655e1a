//! The programs' own log records, forwarded to `tracing`.

use aya_log::EbpfLogger;
use hachi_abi::Reason;
use log::{Level, Log, Metadata, Record};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{Datapath, KernelError};

/// The target of the programs' records.
const TARGET: &str = "hachi::datapath";

/// Reads the programs' log records for as long as it runs.
#[must_use = "records are forwarded only while `run` is polled"]
#[derive(Debug)]
pub struct LogForwarder {
    logger: AsyncFd<Records>,
}

impl Datapath {
    /// The forwarder of the programs' log records; none if they were loaded without a level. Must
    /// be called within a tokio runtime, once.
    ///
    /// # Errors
    /// If the object has no log statement, or the records are being read already.
    pub fn logs(&mut self) -> Result<Option<LogForwarder>, KernelError> {
        if self.options.log_level.is_none() {
            return Ok(None);
        }
        let logger = EbpfLogger::init_with_logger(&mut self.ebpf, Forward)
            .map_err(|error| KernelError::Log(error.to_string()))?;
        // SAFETY: the logger owns its ring buffer's descriptor, never changes it, and closes it
        // only when it is dropped together with the `AsyncFd`.
        let logger =
            unsafe { AsyncFd::register_with_interest(Records(logger), Interest::READABLE) }
                .map_err(|error| KernelError::Log(error.to_string()))?;
        Ok(Some(LogForwarder { logger }))
    }
}

impl LogForwarder {
    /// Forwards records until the runtime ends or the map fails.
    ///
    /// # Errors
    /// If the map cannot be waited for.
    pub async fn run(mut self) -> Result<(), KernelError> {
        loop {
            let mut ready = self
                .logger
                .readable_mut()
                .await
                .map_err(|error| KernelError::Log(error.to_string()))?;
            ready.get_inner_mut().0.flush();
            ready.clear_ready();
        }
    }
}

struct Records(EbpfLogger<Forward>);

impl std::fmt::Debug for Records {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Records")
    }
}

impl std::os::fd::AsRawFd for Records {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

/// From `log`, which aya-log speaks, to `tracing`.
struct Forward;

impl Log for Forward {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let text = named(&record.args().to_string());
        // A level must be constant at each call.
        macro_rules! forward {
            ($level:ident) => {
                tracing::event!(
                    target: TARGET,
                    tracing::Level::$level,
                    program = record.target(),
                    file = record.file(),
                    line = record.line(),
                    "{text}"
                )
            };
        }
        match record.level() {
            Level::Error => forward!(ERROR),
            Level::Warn => forward!(WARN),
            Level::Info => forward!(INFO),
            Level::Debug => forward!(DEBUG),
            Level::Trace => forward!(TRACE),
        }
    }

    fn flush(&self) {}
}

/// The text of a record with the name of its reason in place of `reason=<number>`.
fn named(text: &str) -> String {
    const MARK: &str = "reason=";
    let Some((before, rest)) = text.split_once(MARK) else {
        return text.to_owned();
    };
    let end = rest
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(rest.len());
    let (number, after) = rest.split_at(end);
    let reason = number.parse().ok().and_then(|n: usize| Reason::ALL.get(n));
    match reason {
        Some(reason) => format!("{before}{}{after}", reason.name()),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_named() {
        let number = Reason::SpoofedSource as u32;
        assert_eq!(
            named(&format!("drop reason={number} on 3")),
            "drop spoofed_source on 3"
        );
        for other in ["deliver from 3 to 4", "drop reason=9999 on 3", "reason="] {
            assert_eq!(named(other), other);
        }
    }
}
