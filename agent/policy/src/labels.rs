//! Labels and label selectors, as the Kubernetes API defines them.

use std::fmt;

use crate::SmallSet;

/// Labels of one object, sorted by key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Labels(Box<[(Box<str>, Box<str>)]>);

impl Labels {
    /// The value of a label.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        let at = self.0.binary_search_by(|(k, _)| (**k).cmp(key)).ok()?;
        Some(&*self.0[at].1)
    }

    /// Every label, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (&**k, &**v))
    }
}

impl<K: AsRef<str>, V: AsRef<str>> FromIterator<(K, V)> for Labels {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(labels: I) -> Self {
        let mut all: Vec<(Box<str>, Box<str>)> = labels
            .into_iter()
            .map(|(k, v)| (k.as_ref().into(), v.as_ref().into()))
            .collect();
        // Stable, so that of two equal keys the first counts.
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all.dedup_by(|b, a| a.0 == b.0);
        Self(all.into())
    }
}

/// One condition of a selector.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Requirement {
    /// The label exists, with one of the values.
    In(String, SmallSet<String>),
    /// The label does not exist, or has none of the values.
    NotIn(String, SmallSet<String>),
    /// The label exists.
    Exists(String),
    /// The label does not exist.
    DoesNotExist(String),
}

impl Requirement {
    fn matches(&self, labels: &Labels) -> bool {
        match self {
            Self::In(key, values) => labels.get(key).is_some_and(|v| values.contains(v)),
            Self::NotIn(key, values) => labels.get(key).is_none_or(|v| !values.contains(v)),
            Self::Exists(key) => labels.get(key).is_some(),
            Self::DoesNotExist(key) => labels.get(key).is_none(),
        }
    }
}

/// Operators of `matchExpressions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    /// `In`
    In,
    /// `NotIn`
    NotIn,
    /// `Exists`
    Exists,
    /// `DoesNotExist`
    DoesNotExist,
}

impl Operator {
    /// Reads the API's spelling.
    ///
    /// # Errors
    /// When the API has no such operator.
    pub fn parse(text: &str) -> Result<Self, InvalidSelector> {
        match text {
            "In" => Ok(Self::In),
            "NotIn" => Ok(Self::NotIn),
            "Exists" => Ok(Self::Exists),
            "DoesNotExist" => Ok(Self::DoesNotExist),
            other => Err(InvalidSelector::Operator(other.to_owned())),
        }
    }
}

/// Why a label selector means nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSelector {
    /// Not an operator of the API.
    #[error("unknown operator {0:?}: use In, NotIn, Exists or DoesNotExist")]
    Operator(String),
    /// `In` or `NotIn` without a value.
    #[error("label {0:?}: In and NotIn need at least one value")]
    NoValues(String),
    /// `Exists` or `DoesNotExist` with values.
    #[error("label {0:?}: Exists and DoesNotExist take no values")]
    Values(String),
    /// An empty key.
    #[error("a requirement has an empty label key: name a label")]
    EmptyKey,
}

/// A label selector: every requirement must hold, and none at all matches everything.
///
/// Selectors that were written differently but have the same requirements are equal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Selector {
    requirements: SmallSet<Requirement>,
}

impl Selector {
    /// The selector that matches everything.
    #[must_use]
    pub fn everything() -> Self {
        Self::default()
    }

    /// Adds an entry of `matchLabels`.
    ///
    /// # Errors
    /// When the key is empty.
    pub fn add_label(&mut self, key: &str, value: &str) -> Result<(), InvalidSelector> {
        self.add(key, Operator::In, [value.to_owned()])
    }

    /// Adds an entry of `matchExpressions`.
    ///
    /// # Errors
    /// When the number of values does not suit the operator, or the key is empty.
    pub fn add(
        &mut self,
        key: &str,
        operator: Operator,
        values: impl IntoIterator<Item = String>,
    ) -> Result<(), InvalidSelector> {
        let values: SmallSet<String> = values.into_iter().collect();
        let key = key.to_owned();
        if key.is_empty() {
            return Err(InvalidSelector::EmptyKey);
        }
        let requirement = match (operator, values.is_empty()) {
            (Operator::In, false) => Requirement::In(key, values),
            (Operator::NotIn, false) => Requirement::NotIn(key, values),
            (Operator::In | Operator::NotIn, true) => return Err(InvalidSelector::NoValues(key)),
            (Operator::Exists, true) => Requirement::Exists(key),
            (Operator::DoesNotExist, true) => Requirement::DoesNotExist(key),
            (Operator::Exists | Operator::DoesNotExist, false) => {
                return Err(InvalidSelector::Values(key));
            }
        };
        self.requirements.insert(requirement);
        Ok(())
    }

    /// Whether the labels fulfil every requirement.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements.iter().all(|r| r.matches(labels))
    }

    /// Every requirement, sorted.
    pub fn requirements(&self) -> impl Iterator<Item = &Requirement> {
        self.requirements.iter()
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |values: &SmallSet<String>| values.iter().cloned().collect::<Vec<_>>().join(",");
        let terms: Vec<String> = self
            .requirements
            .iter()
            .map(|r| match r {
                Requirement::In(k, v) if v.len() == 1 => format!("{k}={}", list(v)),
                Requirement::In(k, v) => format!("{k} in ({})", list(v)),
                Requirement::NotIn(k, v) => format!("{k} notin ({})", list(v)),
                Requirement::Exists(k) => k.clone(),
                Requirement::DoesNotExist(k) => format!("!{k}"),
            })
            .collect();
        if terms.is_empty() {
            f.write_str("<all>")
        } else {
            f.write_str(&terms.join(","))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(key: &str, operator: Operator, values: &[&str]) -> Selector {
        let mut s = Selector::everything();
        s.add(key, operator, values.iter().map(|v| (*v).to_owned()))
            .unwrap();
        s
    }

    #[test]
    fn operators_follow_the_api() {
        let web: Labels = [("app", "web")].into_iter().collect();
        let none = Labels::default();
        for (operator, values, on_web, on_none) in [
            (Operator::In, &["web", "db"][..], true, false),
            (Operator::In, &["db"][..], false, false),
            (Operator::NotIn, &["db"][..], true, true),
            (Operator::NotIn, &["web"][..], false, true),
            (Operator::Exists, &[][..], true, false),
            (Operator::DoesNotExist, &[][..], false, true),
        ] {
            let s = selector("app", operator, values);
            assert_eq!(s.matches(&web), on_web, "{s} on app=web");
            assert_eq!(s.matches(&none), on_none, "{s} on no labels");
        }
        assert!(Selector::everything().matches(&none));
    }

    #[test]
    fn requirements_add_up() {
        let mut s = selector("app", Operator::In, &["web"]);
        s.add_label("tier", "front").unwrap();
        assert!(s.matches(&[("app", "web"), ("tier", "front")].into_iter().collect()));
        assert!(!s.matches(&[("app", "web")].into_iter().collect()));
        assert_eq!(s.to_string(), "app=web,tier=front");
    }

    #[test]
    fn what_the_api_forbids_is_an_error() {
        let mut s = Selector::everything();
        assert_eq!(
            s.add("a", Operator::In, []),
            Err(InvalidSelector::NoValues("a".into()))
        );
        assert_eq!(
            s.add("a", Operator::Exists, ["x".to_owned()]),
            Err(InvalidSelector::Values("a".into()))
        );
        assert_eq!(s.add_label("", "x"), Err(InvalidSelector::EmptyKey));
        assert_eq!(
            Operator::parse("Gt"),
            Err(InvalidSelector::Operator("Gt".into()))
        );
        assert_eq!(
            s,
            Selector::everything(),
            "a refused requirement leaves no trace"
        );
    }

    #[test]
    fn writing_order_does_not_count() {
        let mut a = selector("x", Operator::In, &["1", "2"]);
        a.add_label("y", "3").unwrap();
        let mut b = selector("y", Operator::In, &["3"]);
        b.add("x", Operator::In, ["2".to_owned(), "1".to_owned()])
            .unwrap();
        assert_eq!(a, b);
    }
}
