//! Namespaces: each gets its default ServiceAccount, and takes its contents with it when it goes.

use serde_json::json;
use tracing::debug;

use crate::{
    Store,
    resource::{NAMESPACES, PODS, RESOURCES, SERVICE_ACCOUNTS},
    store::{Event, Object, Since, Watch},
};

/// Follows namespaces, and Pods for the last one of a namespace that goes.
pub(super) async fn run(store: Store) {
    loop {
        let (Ok(mut namespaces), Ok(mut pods)) = (
            store.watch(NAMESPACES, Since::Start),
            store.watch(PODS, Since::Now),
        ) else {
            return;
        };
        while follow(&store, &mut namespaces, &mut pods).await {
            // A long backlog must not keep the connections waiting.
            tokio::task::yield_now().await;
        }
    }
}

/// Handles one event; `false` asks for a fresh start.
async fn follow(store: &Store, namespaces: &mut Watch, pods: &mut Watch) -> bool {
    let (event, is_pod) = tokio::select! {
        event = namespaces.next() => (event, false),
        event = pods.next() => (event, true),
    };
    let Ok(Event { object, change, .. }) = event else {
        return false;
    };
    let gone = change == crate::Change::Deleted;
    if !is_pod && !gone {
        settle(store, &object);
    } else if is_pod
        && gone
        && let Ok(namespace) = store.get(NAMESPACES, "", object.namespace())
    {
        settle(store, &namespace);
    }
    true
}

fn settle(store: &Store, namespace: &Object) {
    if namespace.is_terminating() {
        empty(store, namespace);
    } else if store
        .get(SERVICE_ACCOUNTS, namespace.name(), "default")
        .is_err()
    {
        let account = json!({"metadata": {"name": "default", "namespace": namespace.name()}});
        if let Err(error) = store.create(SERVICE_ACCOUNTS, account) {
            debug!(namespace = namespace.name(), %error, "no default ServiceAccount was made");
        }
    }
}

/// Deletes what is in a namespace, and the namespace once nothing is left.
fn empty(store: &Store, namespace: &Object) {
    let mut left = 0;
    for resource in RESOURCES.iter().filter(|resource| resource.namespaced) {
        for object in store.list(resource, namespace.name()) {
            if !object.is_terminating() {
                // It may have gone in between, which is all the same.
                let _ = store.delete(resource, object.namespace(), object.name(), None);
            }
        }
        left += store.list(resource, namespace.name()).len();
    }
    if left == 0 {
        let end = store.write(NAMESPACES, |state| {
            let current = state.get(NAMESPACES, "", namespace.name())?;
            if current.uid() == namespace.uid() {
                state.discard(NAMESPACES, &current);
            }
            Ok(())
        });
        if let Err(error) = end {
            debug!(namespace = namespace.name(), %error, "the namespace was gone already");
        }
    }
}
