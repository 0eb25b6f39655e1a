//! EndpointSlices of Services with a selector, kept true as Pods and Services change.
//!
//! ```text
//!  Services, Pods, slices ── watch ──> index (who selects whom) ──> dirty Services
//!                                                                        │ one at a time
//!                                       store <── fewest writes ── desired slices
//! ```

mod desired;
mod index;
mod write;

use std::collections::BTreeSet;

pub use self::desired::{Slice, slices};
use self::index::Index;
use crate::{
    Change, Failure, Store,
    json::text,
    resource::{ENDPOINT_SLICES, PODS, SERVICES},
    store::{Event, Since, Watch},
};

/// Namespace and name.
type Key = (String, String);

/// What marks the slices of this controller.
const MANAGED_BY: (&str, &str) = (
    "endpointslice.kubernetes.io/managed-by",
    "endpointslice-controller.k8s.io",
);

/// What names a slice's Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

struct Controller {
    services: Watch,
    pods: Watch,
    slices: Watch,
    index: Index,
    dirty: BTreeSet<Key>,
}

/// Follows Services, Pods and slices.
pub(super) async fn run(store: Store) {
    loop {
        let (Ok(services), Ok(pods), Ok(slices)) = (
            store.watch(SERVICES, Since::Start),
            store.watch(PODS, Since::Start),
            store.watch(ENDPOINT_SLICES, Since::Start),
        ) else {
            return;
        };
        let (index, dirty) = (Index::default(), BTreeSet::new());
        let mut controller = Controller {
            services,
            pods,
            slices,
            index,
            dirty,
        };
        while controller.step().await.is_ok() {
            for (namespace, name) in std::mem::take(&mut controller.dirty) {
                write::reconcile(&store, &controller.index, &namespace, &name);
                tokio::task::yield_now().await;
            }
        }
    }
}

impl Controller {
    /// Waits for a change, and takes in all that are there.
    async fn step(&mut self) -> Result<(), Failure> {
        tokio::select! {
            event = self.services.next() => {
                let event = event?;
                self.service(&event);
            }
            event = self.pods.next() => {
                let event = event?;
                self.pod(&event);
            }
            event = self.slices.next() => {
                let event = event?;
                self.slice(&event);
            }
        }
        while let Some(event) = self.services.ready()? {
            self.service(&event);
        }
        while let Some(event) = self.pods.ready()? {
            self.pod(&event);
        }
        while let Some(event) = self.slices.ready()? {
            self.slice(&event);
        }
        Ok(())
    }

    fn service(&mut self, event: &Event) {
        if let Some(previous) = &event.previous {
            self.index.forget_service(previous);
        }
        if event.change != Change::Deleted {
            self.index.learn_service(&event.object);
        }
        self.dirty
            .insert((event.object.namespace().into(), event.object.name().into()));
    }

    fn pod(&mut self, event: &Event) {
        if let Some(previous) = &event.previous {
            self.dirty.extend(self.index.services_of(previous));
            self.index.forget_pod(previous);
        }
        if event.change != Change::Deleted {
            self.dirty.extend(self.index.services_of(&event.object));
            self.index.learn_pod(&event.object);
        }
    }

    /// Somebody else may have changed or deleted a slice.
    fn slice(&mut self, event: &Event) {
        let labels = &event.object["metadata"]["labels"];
        if labels[MANAGED_BY.0] == MANAGED_BY.1 {
            let service = text(&labels[SERVICE_NAME]);
            self.dirty
                .insert((event.object.namespace().into(), service.into()));
        }
    }
}
