//! Which Services select which Pods, found by label instead of by looking at all of them.

use std::collections::{BTreeSet, HashMap};

use super::Key;
use crate::{
    json::{entries, text},
    store::Object,
};

/// Namespace, label key and label value.
type Label = (String, String, String);

/// Pods and Services of each namespace, by label.
#[derive(Debug, Default)]
pub(super) struct Index {
    pods: HashMap<Label, BTreeSet<String>>,
    /// A Service stands under the first label of its selector, with the whole selector.
    services: HashMap<Label, HashMap<String, Vec<Label>>>,
}

impl Index {
    pub(super) fn learn_pod(&mut self, pod: &Object) {
        for label in labels(pod) {
            self.pods
                .entry(label)
                .or_default()
                .insert(pod.name().to_owned());
        }
    }

    pub(super) fn forget_pod(&mut self, pod: &Object) {
        for label in labels(pod) {
            if let Some(names) = self.pods.get_mut(&label) {
                names.remove(pod.name());
                if names.is_empty() {
                    self.pods.remove(&label);
                }
            }
        }
    }

    pub(super) fn learn_service(&mut self, service: &Object) {
        let selector = selector(service);
        if let Some(first) = selector.first().cloned() {
            let services = self.services.entry(first).or_default();
            services.insert(service.name().to_owned(), selector);
        }
    }

    pub(super) fn forget_service(&mut self, service: &Object) {
        if let Some(first) = selector(service).first()
            && let Some(services) = self.services.get_mut(first)
        {
            services.remove(service.name());
            if services.is_empty() {
                self.services.remove(first);
            }
        }
    }

    /// The Services that select a Pod.
    pub(super) fn services_of(&self, pod: &Object) -> Vec<Key> {
        let labels: Vec<Label> = labels(pod).collect();
        let candidates = labels
            .iter()
            .filter_map(|label| self.services.get(label))
            .flatten();
        candidates
            .filter(|(_, selector)| selector.iter().all(|label| labels.contains(label)))
            .map(|(name, _)| (pod.namespace().to_owned(), name.clone()))
            .collect()
    }

    /// The names of the Pods that a Service selects.
    pub(super) fn pods_of(&self, service: &Object) -> BTreeSet<String> {
        let empty = BTreeSet::new();
        let mut sets: Vec<&BTreeSet<String>> = selector(service)
            .iter()
            .map(|label| self.pods.get(label).unwrap_or(&empty))
            .collect();
        sets.sort_by_key(|set| set.len());
        let Some((smallest, rest)) = sets.split_first() else {
            return BTreeSet::new();
        };
        smallest
            .iter()
            .filter(|name| rest.iter().all(|set| set.contains(*name)))
            .cloned()
            .collect()
    }
}

fn labels(pod: &Object) -> impl Iterator<Item = Label> + '_ {
    pairs(pod.namespace(), &pod["metadata"]["labels"])
}

fn selector(service: &Object) -> Vec<Label> {
    pairs(service.namespace(), &service["spec"]["selector"]).collect()
}

fn pairs<'a>(
    namespace: &'a str,
    map: &'a serde_json::Value,
) -> impl Iterator<Item = Label> + use<'a> {
    entries(map).map(move |(key, value)| (namespace.into(), key.clone(), text(value).to_owned()))
}
