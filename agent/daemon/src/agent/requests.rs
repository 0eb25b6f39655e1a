//! What the plugin and the command line ask of the agent, and what they are answered.

use std::{collections::BTreeSet, mem, time::Instant};

use hachi_api::{ApiError, Attachment, AttachmentId, PodRef, Reply, Request, Status};
use hachi_compile::Problem;
use hachi_kernel::{KernelError, Role};
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::Agent;
use crate::{
    convert,
    metrics::{self, Sample},
    options::UnknownPods,
    policy, tables,
    watch::KINDS,
};

/// What is asked of the main task, and where its answer goes.
pub(crate) enum Ask {
    /// By the plugin or the command line.
    Request {
        request: Box<Request>,
        reply: oneshot::Sender<Reply>,
        /// When it came.
        at: Instant,
    },
    /// Whether an ADD can be served; what is in the way otherwise.
    Ready(oneshot::Sender<Result<(), String>>),
    /// What metrics are made of.
    Sample(oneshot::Sender<Sample>),
}

/// A request about a Pod that the API has not shown yet.
pub(super) struct Waiting {
    what: Awaited,
    pub(super) deadline: Instant,
    asker: Asker,
}

/// Who waits for an answer.
struct Asker {
    reply: oneshot::Sender<Reply>,
    /// What the plugin calls it.
    operation: Option<&'static str>,
    at: Instant,
}

enum Awaited {
    /// An ADD: the endpoint is in place, and denied until its Pod is known.
    Endpoint(AttachmentId),
    /// What the Pod asks for.
    Pod(PodRef),
}

impl Agent {
    pub(super) fn ask(&mut self, ask: Ask) {
        match ask {
            Ask::Request { request, reply, at } => {
                let operation = metrics::operation(&request);
                let asker = Asker {
                    reply,
                    operation,
                    at,
                };
                self.serve(*request, asker);
            }
            // Who has hung up needs no answer.
            Ask::Ready(reply) => drop(reply.send(match (self.not_ready(), &self.kernel_error) {
                (Some(error), _) => Err(error.message),
                (None, Some(error)) => Err(format!("kernel: {error}")),
                (None, None) => Ok(()),
            })),
            Ask::Sample(reply) => drop(reply.send(self.sample())),
        }
    }

    fn sample(&self) -> Sample {
        let watches = KINDS.iter().map(|kind| {
            let (synced, failing) = (&self.synced, &self.watch_errors);
            (*kind, synced.contains(kind), failing.contains_key(kind))
        });
        let counters = self.datapath.counters().unwrap_or_else(|error| {
            warn!(%error, "the counters are not readable");
            Vec::new()
        });
        Sample {
            ready: self.is_synced() && self.kernel_error.is_none(),
            problems: self.problems().len(),
            endpoints: self.attachments.len(),
            closed: self.closed.problems().count(),
            refused: (self.compiled.problems.iter())
                .map(|problem| match problem {
                    Problem::TooLarge { pods, .. } => pods.len(),
                    Problem::PortTaken { .. } => 0,
                })
                .sum(),
            revision: self.datapath.revision().unwrap_or_default(),
            watches: watches.collect(),
            counters,
            conntrack: self.collector.status(),
            measured: self.measured.clone(),
        }
    }

    fn serve(&mut self, request: Request, asker: Asker) {
        let answer = match request {
            Request::Pool => self.pool(),
            Request::AddEndpoint { attachment } => {
                let id = attachment.id.clone();
                match self.add(attachment) {
                    Ok(true) => Reply::Done,
                    // It was waited for when its addresses were asked for.
                    Ok(false) if self.is_overdue(&id) => Reply::Done,
                    Ok(false) => {
                        let deadline = Instant::now() + self.options.pod_wait;
                        self.waiting.push(Waiting {
                            what: Awaited::Endpoint(id),
                            deadline,
                            asker,
                        });
                        return;
                    }
                    Err(error) => Reply::Error { error },
                }
            }
            Request::Pod { pod } => match self.pod(&pod) {
                Some(reply) => reply,
                None => {
                    let deadline = Instant::now() + self.options.pod_wait;
                    self.waiting.push(Waiting {
                        what: Awaited::Pod(pod),
                        deadline,
                        asker,
                    });
                    return;
                }
            },
            Request::DeleteEndpoint { attachment } => self.delete(&attachment),
            Request::CheckEndpoint { attachment } => self.check(&attachment),
            Request::Gc { valid } => self.gc(&valid.into_iter().collect()),
            Request::Status => Reply::Status {
                status: Box::new(self.current_status()),
            },
            Request::TracePolicy {
                from,
                to,
                protocol,
                port,
            } => self.policy_view().trace(&from, &to, protocol, port),
            Request::PodPolicies { namespace, name } => {
                self.policy_view().of_pod(&namespace, &name)
            }
            Request::Get { table } => tables::table(
                table,
                &self.datapath,
                &self.image,
                &self.compiled,
                &self.attachments,
            ),
        };
        self.answer(asker, answer);
    }

    fn answer(&mut self, asker: Asker, answer: Reply) {
        let Asker {
            reply,
            operation,
            at,
        } = asker;
        self.measured.answered(operation, at.elapsed(), &answer);
        // A client that has hung up needs no answer.
        let _ = reply.send(answer);
    }

    fn policy_view(&mut self) -> policy::View<'_> {
        policy::View {
            index: &mut self.index,
            datapath: &self.datapath,
            image: &self.image,
            compiled: &self.compiled,
        }
    }

    pub(super) fn not_ready(&self) -> Option<ApiError> {
        if self.is_synced() {
            return None;
        }
        let missing: Vec<_> = KINDS
            .iter()
            .filter(|kind| !self.synced.contains(kind))
            .map(|k| format!("{k:?}"))
            .collect();
        Some(ApiError {
            code: 11,
            message: format!(
                "the agent waits for the API server's list of {}",
                missing.join(", ")
            ),
            details: self
                .watch_errors
                .values()
                .next()
                .cloned()
                .unwrap_or_default(),
        })
    }

    fn pool(&mut self) -> Reply {
        if let Some(error) = self.not_ready() {
            return Reply::Error { error };
        }
        let cidrs = self.index.desired().pod_cidrs();
        if cidrs.is_empty() {
            return Reply::Error {
                error: ApiError {
                    code: 11,
                    message: format!("Node {} has no podCIDR yet", self.options.node_name),
                    details: "the controller manager assigns it with --allocate-node-cidrs".into(),
                },
            };
        }
        Reply::Pool {
            cidrs,
            mtu: self.node.mtu(),
        }
    }

    /// Takes up an endpoint. `Ok(false)`: it is in place, denied until the API shows its Pod.
    fn add(&mut self, attachment: Attachment) -> Result<bool, ApiError> {
        if let Some(error) = self.not_ready() {
            return Err(error);
        }
        let id = attachment.id.clone();
        let endpoint = convert::endpoint(&attachment)?;
        if let Some(error) = convert::port_conflict(&self.attachments, &attachment) {
            return Err(error);
        }
        self.index.add_endpoint(endpoint);
        self.dirty = true;
        self.attachments.insert(id.clone(), attachment.clone());
        // Maps before programs: a program without its endpoint's entry would only drop, but an
        // entry without a program costs nothing.
        let done = self.sync().and_then(|()| self.attach(&attachment));
        if let Err(error) = done {
            self.forget(&id);
            if let Err(error) = self.sync() {
                warn!(%error, "a failed endpoint is still in the maps; it is removed later");
            }
            return Err(kernel_error(
                "cannot enforce policy for the endpoint",
                &error,
            ));
        }
        let known = attachment.pod.as_ref().is_none_or(|pod| {
            self.index
                .knows_pod(&pod.namespace, &pod.name, pod.uid.as_deref())
        });
        info!(container = id.container_id, pod = ?attachment.pod, addresses = ?attachment.addresses,
              known, "endpoint added");
        Ok(known)
    }

    /// What a Pod asks for; `None` if the API has not shown it yet.
    fn pod(&self, pod: &PodRef) -> Option<Reply> {
        if let Some(error) = self.not_ready() {
            return Some(Reply::Error { error });
        }
        let wanted = self.index.wanted_addresses(&convert::pod_name(pod))?;
        Some(match wanted {
            Ok(addresses) => Reply::Pod { addresses },
            Err(why) => Reply::Error {
                error: ApiError {
                    code: 7,
                    message: format!(
                        "the annotation {} of Pod {}/{}: {why}",
                        hachi_index::ADDRESSES_ANNOTATION,
                        pod.namespace,
                        pod.name
                    ),
                    details: "name one address of each family at most, with a comma between".into(),
                },
            },
        })
    }

    pub(super) fn answer_waiting(&mut self) {
        let now = Instant::now();
        for waiting in mem::take(&mut self.waiting) {
            let late = waiting.deadline <= now;
            let answer = match &waiting.what {
                Awaited::Endpoint(id) => self.answer_add(id, late),
                Awaited::Pod(pod) => match self.pod(pod) {
                    None if late => Some(self.give_up(pod.clone())),
                    reply => reply,
                },
            };
            match answer {
                Some(answer) => self.answer(waiting.asker, answer),
                None => self.waiting.push(waiting),
            }
        }
    }

    /// Answers for a Pod that the API has not shown in time.
    fn give_up(&mut self, pod: PodRef) -> Reply {
        match self.options.unknown_pods {
            UnknownPods::Refuse => not_shown(&pod),
            UnknownPods::Deny => {
                warn!(
                    pod = format!("{}/{}", pod.namespace, pod.name),
                    "the API does not show this Pod yet; it is denied until it does"
                );
                let index = &self.index;
                self.overdue
                    .retain(|pod| !index.knows_pod(&pod.namespace, &pod.name, pod.uid.as_deref()));
                self.overdue.insert(pod);
                Reply::Pod {
                    addresses: Vec::new(),
                }
            }
        }
    }

    /// Whether the Pod of an attachment has been waited for already. Asked once.
    fn is_overdue(&mut self, id: &AttachmentId) -> bool {
        let pod = self.attachments.get(id).and_then(|it| it.pod.as_ref());
        pod.is_some_and(|pod| self.overdue.remove(pod))
    }

    fn answer_add(&self, id: &AttachmentId, late: bool) -> Option<Reply> {
        let known = self.attachments.get(id).is_none_or(|attachment| {
            attachment.pod.as_ref().is_none_or(|pod| {
                self.index
                    .knows_pod(&pod.namespace, &pod.name, pod.uid.as_deref())
            })
        });
        if late && !known {
            warn!(
                container = id.container_id,
                "the API does not show this Pod yet; it is denied until it does"
            );
        }
        (known || late).then_some(Reply::Done)
    }

    /// Drops an endpoint from memory and its links from the kernel; the next sync clears the maps.
    fn forget(&mut self, id: &AttachmentId) {
        self.dirty |= self.index.remove_endpoint(&convert::key(id));
        if let Some(attachment) = self.attachments.remove(id) {
            self.closed.forget(&attachment.host_ifname);
            self.settling.forget(&attachment.host_ifname);
            let ifindex = attachment.host_ifindex;
            if let Err(error) = self.datapath.let_go(ifindex, &attachment.host_ifname) {
                warn!(%error, interface = attachment.host_ifname, "cannot detach");
            }
        }
    }

    fn delete(&mut self, id: &AttachmentId) -> Reply {
        self.forget(id);
        match self.sync() {
            Ok(()) => Reply::Done,
            Err(error) => Reply::Error {
                error: kernel_error("cannot remove the endpoint", &error),
            },
        }
    }

    fn check(&mut self, id: &AttachmentId) -> Reply {
        let Some(attachment) = self.attachments.get(id) else {
            return Reply::Error {
                error: ApiError {
                    code: 3,
                    message: format!(
                        "the agent knows no endpoint {}/{}",
                        id.container_id, id.ifname
                    ),
                    details: "delete and add the Pod again".into(),
                },
            };
        };
        let missing: Vec<_> = attachment
            .addresses
            .iter()
            .filter(|address| !self.image.endpoints.contains_key(address))
            .collect();
        if !missing.is_empty() {
            return Reply::Error {
                error: ApiError {
                    code: 11,
                    message: format!("no map entry for {missing:?}"),
                    details: self.kernel_error.clone().unwrap_or_default(),
                },
            };
        }
        match self
            .datapath
            .check(Role::Pod, attachment.host_ifindex, &attachment.host_ifname)
        {
            Ok(()) => Reply::Done,
            Err(error) => Reply::Error {
                error: kernel_error("the programs are not in place", &error),
            },
        }
    }

    fn gc(&mut self, valid: &BTreeSet<AttachmentId>) -> Reply {
        let stale: Vec<_> = self
            .attachments
            .keys()
            .filter(|id| !valid.contains(*id))
            .cloned()
            .collect();
        for id in &stale {
            self.forget(id);
        }
        let pins = self
            .node
            .interfaces()
            .and_then(|interfaces| self.drop_pins_without_interface(&interfaces));
        if let Err(error) = pins {
            return Reply::Error {
                error: ApiError {
                    code: 5,
                    message: format!("cannot look for what is stale: {error:#}"),
                    details: String::new(),
                },
            };
        }
        match self.sync() {
            Ok(()) => Reply::Done,
            Err(error) => Reply::Error {
                error: kernel_error("cannot remove endpoints", &error),
            },
        }
    }

    fn problems(&self) -> Vec<String> {
        let mut problems: Vec<String> = self.not_ready().map(|e| e.message).into_iter().collect();
        problems.extend(
            self.watch_errors
                .iter()
                .map(|(kind, e)| format!("watch of {kind:?}: {e}")),
        );
        problems.extend(self.kernel_error.iter().map(|e| format!("kernel: {e}")));
        problems.extend(self.closed.problems());
        problems.extend(self.node.problems().cloned());
        problems.extend(self.health.problems());
        problems.extend(self.shared_ports.iter().map(|(_, problem)| problem.clone()));
        problems.extend(self.index.problems().iter().map(ToString::to_string));
        problems.extend(self.compiled.problems.iter().map(ToString::to_string));
        problems
    }

    fn current_status(&self) -> Status {
        let problems = self.problems();
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            abi: hachi_abi::ABI_VERSION,
            node: self.options.node_name.clone(),
            ready: self.is_synced() && self.kernel_error.is_none(),
            problems,
            attach_mode: self
                .attach_kind
                .map(|kind| kind.to_string())
                .unwrap_or_default(),
            missing: convert::missing(&self.features),
            maps: convert::map_use(&self.datapath),
            socket_lb: self.socket_lb.clone(),
            xdp: self.early.states(),
            conntrack: self.collector.status(),
            endpoints: u32::try_from(self.attachments.len()).unwrap_or(u32::MAX),
            revision: self.datapath.revision().unwrap_or_default(),
            pid: std::process::id(),
        }
    }
}

fn not_shown(pod: &PodRef) -> Reply {
    Reply::Error {
        error: ApiError {
            code: 11,
            message: format!(
                "the API has not shown Pod {}/{} to the agent yet",
                pod.namespace, pod.name
            ),
            details: "its annotations and policies are not known".into(),
        },
    }
}

fn kernel_error(what: &str, error: &KernelError) -> ApiError {
    ApiError {
        code: 11,
        message: format!("{what}: {error}"),
        details: String::new(),
    }
}
