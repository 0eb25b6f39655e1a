//! What the rules in force ask of Pods, and what a Pod answers.
//!
//! A rule asks only the Pods of the namespaces that it names. So a rule that comes changes the answers
//! of Pods there alone, and of these only if they have a label, with a value, that it is about.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use hachi_policy::{
    Labels, Namespaces, Peer, PodIdentity, Protocol, Requirement, Selector as LabelSelector,
    SmallSet,
};

/// A name for ports that the peer's Pod has to resolve.
pub(crate) type PortName = (Arc<str>, Protocol);

/// Everything of a Pod that the rules in force can ask for. Two Pods that answer alike are the same
/// to every one of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    /// By namespace, where it is named.
    named: BTreeMap<Arc<str>, Questions>,
    /// By the namespaces' labels.
    selected: BTreeMap<LabelSelector, Questions>,
    /// Labels of namespaces.
    of_namespaces: Values,
    /// Ports, of every Pod.
    ports_of_any: BTreeSet<PortName>,
}

/// What is asked of the Pods of some namespaces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Questions {
    labels: Values,
    ports: BTreeSet<PortName>,
}

/// By label, what is asked for.
type Values = BTreeMap<String, Value>;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Value {
    /// Whether it is one of these.
    values: BTreeSet<String>,
    /// Whether the label is there at all.
    existence: bool,
}

/// Labels that are asked for; without a value where only their existence counts.
type Told = Vec<(String, Option<String>)>;

/// What a Pod answers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Answer {
    namespace: Option<Arc<str>>,
    /// `None` as long as the namespace is not known.
    namespace_labels: Option<Told>,
    labels: Told,
    pub(crate) ports: Vec<(PortName, u16)>,
}

impl Asked {
    /// Takes in what a peer asks.
    pub(crate) fn add(&mut self, peer: &Peer) {
        let Peer::Pods { namespaces, pods } = peer else {
            return;
        };
        if let Namespaces::Selected(selector) = namespaces {
            ask(&mut self.of_namespaces, selector);
        }
        ask(&mut self.of(namespaces).labels, pods);
    }

    /// Takes in the name of a port of these peers.
    pub(crate) fn add_port(&mut self, peers: &SmallSet<Peer>, name: &PortName) {
        for peer in peers {
            if let Peer::Pods { namespaces, .. } = peer {
                self.of(namespaces).ports.insert(name.clone());
            }
        }
    }

    /// Takes in names of ports of whoever it is.
    pub(crate) fn add_ports_of_any(&mut self, names: &BTreeSet<PortName>) {
        self.ports_of_any.extend(names.iter().cloned());
    }

    fn of(&mut self, namespaces: &Namespaces) -> &mut Questions {
        match namespaces {
            Namespaces::Named(name) => self.named.entry(name.clone()).or_default(),
            Namespaces::Selected(selector) => self.selected.entry(selector.clone()).or_default(),
        }
    }

    /// What a Pod answers.
    pub(crate) fn answer(&self, pod: &PodIdentity) -> Answer {
        let named = self.named.get_key_value(&pod.namespace);
        let of_namespace = pod.namespace_labels.as_deref();
        let selected = of_namespace.map(|labels| {
            let selected = self.selected.iter();
            selected.filter(|(selector, _)| selector.matches(labels))
        });
        let questions: Vec<&Questions> = (named.map(|(_, questions)| questions).into_iter())
            .chain(selected.into_iter().flatten().map(|(_, q)| q))
            .collect();
        let names: BTreeSet<&PortName> = (questions.iter().flat_map(|q| &q.ports))
            .chain(&self.ports_of_any)
            .collect();
        let ports = names.into_iter().flat_map(|name| {
            let ports = pod.resolve(&name.0, name.1);
            ports.map(|port| (name.clone(), port))
        });
        let labels: Vec<&Values> = questions.iter().map(|q| &q.labels).collect();
        Answer {
            namespace: named.map(|(name, _)| name.clone()),
            namespace_labels: of_namespace
                .filter(|_| !self.selected.is_empty())
                .map(|labels| told(&[&self.of_namespaces], labels)),
            labels: told(&labels, &pod.labels),
            ports: ports.collect::<BTreeSet<_>>().into_iter().collect(),
        }
    }

    /// What differs between this and `other`, as something that tells whose answers may differ.
    pub(crate) fn difference<'a>(&'a self, other: &'a Self) -> Difference<'a> {
        let everybody = self.of_namespaces != other.of_namespaces
            || self.selected.is_empty() != other.selected.is_empty()
            || self.ports_of_any != other.ports_of_any;
        Difference {
            everybody,
            named: differing(&self.named, &other.named).collect(),
            selected: differing(&self.selected, &other.selected).collect(),
        }
    }
}

/// Whose answers may have changed.
#[derive(Debug)]
pub(crate) struct Difference<'a> {
    everybody: bool,
    named: BTreeSet<&'a Arc<str>>,
    selected: Vec<&'a LabelSelector>,
}

impl Difference<'_> {
    /// Whether the Pod's answer may have.
    pub(crate) fn concerns(&self, pod: &PodIdentity) -> bool {
        self.everybody
            || self.named.contains(&pod.namespace)
            || pod.namespace_labels.as_deref().is_some_and(|labels| {
                let mut selected = self.selected.iter();
                selected.any(|selector| selector.matches(labels))
            })
    }
}

fn differing<'a, K: Ord, V: PartialEq>(
    a: &'a BTreeMap<K, V>,
    b: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = &'a K> {
    let in_a = a.iter().filter(|(key, value)| b.get(key) != Some(*value));
    let in_b = b.keys().filter(|key| !a.contains_key(key));
    in_a.map(|(key, _)| key).chain(in_b)
}

fn ask(asked: &mut Values, selector: &LabelSelector) {
    for requirement in selector.requirements() {
        let (key, values) = match requirement {
            Requirement::In(key, values) | Requirement::NotIn(key, values) => (key, Some(values)),
            Requirement::Exists(key) | Requirement::DoesNotExist(key) => (key, None),
        };
        if !asked.contains_key(key) {
            asked.insert(key.clone(), Value::default());
        }
        if let Some(value) = asked.get_mut(key) {
            value.existence |= values.is_none();
            value.values.extend(values.into_iter().flatten().cloned());
        }
    }
}

fn told(asked: &[&Values], labels: &Labels) -> Told {
    let told = labels.iter().filter_map(|(key, value)| {
        let about = || asked.iter().filter_map(|asked| asked.get(key));
        if about().any(|asked| asked.values.contains(value)) {
            return Some((key.to_owned(), Some(value.to_owned())));
        }
        (about().any(|asked| asked.existence)).then(|| (key.to_owned(), None))
    });
    told.collect()
}

#[cfg(test)]
mod tests {
    use hachi_policy::Operator;

    use super::*;

    fn pod(namespace: &str, team: &str, app: &str) -> PodIdentity {
        let labels = |key: &str, value: &str| Arc::new([(key, value)].into_iter().collect());
        PodIdentity {
            namespace: namespace.into(),
            namespace_labels: Some(labels("team", team)),
            labels: labels("app", app),
            ports: [].into(),
        }
    }

    fn peer(namespaces: Namespaces, operator: Operator, values: &[&str]) -> Peer {
        let mut pods = LabelSelector::everything();
        let values = values.iter().map(|value| (*value).to_owned());
        pods.add("app", operator, values).expect("a selector");
        Peer::Pods { namespaces, pods }
    }

    #[test]
    fn only_the_pods_that_a_rule_is_about_are_told_apart() {
        let mut asked = Asked::default();
        let named = Namespaces::Named("a".into());
        asked.add(&peer(named.clone(), Operator::In, &["web"]));
        let answer = |asked: &Asked, namespace, app| asked.answer(&pod(namespace, "x", app));
        assert_ne!(answer(&asked, "a", "web"), answer(&asked, "a", "db"));
        assert_eq!(answer(&asked, "a", "db"), answer(&asked, "a", "other"));
        assert_eq!(answer(&asked, "b", "web"), answer(&asked, "c", "db"));

        let before = asked.clone();
        asked.add(&peer(named, Operator::NotIn, &["db"]));
        let difference = before.difference(&asked);
        assert!(difference.concerns(&pod("a", "x", "web")));
        assert!(!difference.concerns(&pod("b", "x", "web")));
        assert_eq!(answer(&before, "a", "other"), answer(&asked, "a", "other"));
        assert_ne!(answer(&asked, "a", "db"), answer(&asked, "a", "other"));
    }

    #[test]
    fn namespaces_are_told_apart_by_what_is_asked_of_them() {
        let mut team = LabelSelector::everything();
        team.add_label("team", "x").expect("a selector");
        let mut asked = Asked::default();
        let before = asked.clone();
        asked.add(&peer(Namespaces::Selected(team), Operator::Exists, &[]));
        let answer = |team, app| asked.answer(&pod("a", team, app));
        assert_eq!(answer("x", "web"), answer("x", "db"));
        assert_ne!(answer("x", "web"), answer("y", "web"));
        assert_eq!(answer("y", "web"), answer("z", "db"));
        assert!(before.difference(&asked).concerns(&pod("a", "y", "web")));
    }
}
