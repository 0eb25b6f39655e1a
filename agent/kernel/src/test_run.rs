//! Running a program on a packet without sending it (BPF_PROG_TEST_RUN).

use std::time::Duration;

use aya::{
    maps::Map,
    programs::{TestRun, TestRunOptions, TestRunResult},
};

use hachi_abi::map;

use crate::{Datapath, Hook, KernelError};

/// Room that a program may grow a packet by.
const HEADROOM: usize = 256;

/// The size of `struct __sk_buff` up to and with `ifindex`; the kernel takes any prefix.
const CONTEXT: usize = 192;
/// The offset of `ifindex` in `struct __sk_buff`.
const IFINDEX: usize = 40;
/// The offset of `ingress_ifindex`.
const INGRESS_IFINDEX: usize = 36;

/// Where a packet came to the node from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A device has received it.
    Received,
    /// The node's own stack has made it.
    Own,
}

/// What a program did with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The program's verdict (`TC_ACT_...`).
    pub verdict: i32,
    /// The packet as it left.
    pub packet: Vec<u8>,
    /// The mean time of one run.
    pub duration: Duration,
}

impl Datapath {
    /// Empties every table but the counters, as if no agent had configured the datapath and no packet
    /// had passed: for tests that take turns with one.
    ///
    /// # Errors
    /// If a map cannot be read or written.
    pub fn clear(&self) -> Result<(), KernelError> {
        for (name, table) in &self.tables {
            if *name == map::ABI {
                continue;
            }
            let (mut keys, mut zeros) = (Vec::new(), Vec::new());
            table.each(|key, value| {
                keys.extend_from_slice(key);
                zeros.resize(zeros.len() + value.len(), 0);
            })?;
            if self.is_array(name) {
                table.put(&keys, &zeros)?;
            } else {
                table.delete(&keys)?;
            }
        }
        Ok(())
    }

    fn is_array(&self, name: &str) -> bool {
        matches!(self.ebpf.map(name), Some(Map::Array(_)))
    }

    /// Runs a program `repeat` times on one packet that seems to come through the interface
    /// `ifindex` of the calling thread's network namespace. A packet that a run changed is what
    /// the next run gets.
    ///
    /// Maps and counters change as they would for a real packet; a redirect goes nowhere.
    ///
    /// # Errors
    /// If the kernel refuses, as it does for packets shorter than an Ethernet header.
    pub fn test_run(
        &self,
        hook: Hook,
        ifindex: u32,
        packet: &[u8],
        repeat: u32,
    ) -> Result<Run, KernelError> {
        self.test_run_from(Origin::Received, hook, ifindex, packet, repeat)
    }

    /// As [`Datapath::test_run`], of a packet with another origin.
    ///
    /// # Errors
    /// As [`Datapath::test_run`].
    pub fn test_run_from(
        &self,
        origin: Origin,
        hook: Hook,
        ifindex: u32,
        packet: &[u8],
        repeat: u32,
    ) -> Result<Run, KernelError> {
        let mut context = [0; CONTEXT];
        context[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
        if origin == Origin::Received {
            context[INGRESS_IFINDEX..INGRESS_IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
        }
        let mut out = vec![0; packet.len() + HEADROOM];
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(&context);
        options.repeat = repeat;
        let result =
            self.program(hook)?
                .test_run(options)
                .map_err(|source| KernelError::TestRun {
                    hook,
                    source: Box::new(source),
                })?;
        out.truncate(result.data_size_out as usize);
        Ok(run(out, &result))
    }

    /// Runs the XDP program on one packet that seems to come through the loopback device; as
    /// [`Datapath::test_run`] otherwise.
    ///
    /// # Errors
    /// If the verifier rejects the program, or the kernel refuses.
    pub fn test_run_xdp(&mut self, packet: &[u8], repeat: u32) -> Result<Run, KernelError> {
        self.load_xdp()?;
        let mut out = vec![0; packet.len() + HEADROOM];
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet);
        options.data_out = Some(&mut out);
        options.repeat = repeat;
        let result =
            self.loaded_xdp()?
                .test_run(options)
                .map_err(|source| KernelError::Program {
                    program: "xdp_net".to_owned(),
                    source: Box::new(source),
                })?;
        out.truncate(result.data_size_out as usize);
        Ok(run(out, &result))
    }
}

fn run(packet: Vec<u8>, result: &TestRunResult) -> Run {
    Run {
        verdict: result.return_value.cast_signed(),
        packet,
        duration: result.duration,
    }
}
