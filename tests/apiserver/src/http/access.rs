//! Who asks, and whether they may.

use std::collections::HashMap;

use http::{HeaderMap, header::AUTHORIZATION};

use super::request::Path;
use crate::{
    config::{Grant, Rule},
    failure::Failure,
};

/// The name of who has no token.
const ANONYMOUS: &str = "system:anonymous";

/// The known tokens.
#[derive(Debug)]
pub(crate) struct Access {
    administrator: String,
    grants: HashMap<String, Grant>,
}

/// The bearer of a token.
#[derive(Debug)]
pub(super) enum User<'a> {
    /// May do everything.
    Administrator,
    /// May do what the grant says.
    Granted(&'a Grant),
    /// Has no token, and may do nothing.
    Anonymous,
}

impl Access {
    pub(crate) fn new(administrator: &str, grants: Vec<Grant>) -> Self {
        let grants = grants
            .into_iter()
            .map(|grant| (grant.token.clone(), grant))
            .collect();
        Self {
            administrator: administrator.into(),
            grants,
        }
    }

    /// Finds out who asks; a token that is not known is refused, none at all is nobody's.
    pub(super) fn user(&self, headers: &HeaderMap) -> Result<User<'_>, Failure> {
        let header = headers
            .get(AUTHORIZATION)
            .and_then(|value| value.to_str().ok());
        let token = header
            .and_then(|value| value.strip_prefix("Bearer "))
            .map(str::trim);
        match token {
            Some(token) if token == self.administrator => Ok(User::Administrator),
            Some(token) => self
                .grants
                .get(token)
                .map(User::Granted)
                .ok_or_else(Failure::unauthorized),
            None => Ok(User::Anonymous),
        }
    }
}

impl User<'_> {
    /// Refuses paths that name no resource: to nobody, and those of this server alone to all but the
    /// administrator.
    pub(super) fn enter(&self, verb: &str, path: &str) -> Result<(), Failure> {
        let user = match self {
            Self::Administrator => return Ok(()),
            Self::Granted(_) if !path.starts_with("/-/") => return Ok(()),
            Self::Granted(grant) => &grant.user,
            Self::Anonymous => ANONYMOUS,
        };
        Err(Failure::forbidden_path(user, verb, path))
    }

    /// Refuses what none of the user's rules allows.
    pub(super) fn authorize(&self, verb: &str, path: &Path) -> Result<(), Failure> {
        let (user, rules): (_, &[Rule]) = match self {
            Self::Administrator => return Ok(()),
            Self::Granted(grant) => (grant.user.as_str(), &grant.rules),
            Self::Anonymous => (ANONYMOUS, &[]),
        };
        let resource = path.resource;
        let mut name = resource.plural.to_owned();
        if !path.subresource.is_empty() {
            name = format!("{name}/{}", path.subresource);
        }
        let any =
            |list: &[String], wanted: &str| list.iter().any(|item| item == "*" || item == wanted);
        let allows = |rule: &Rule| {
            any(&rule.groups, resource.group)
                && any(&rule.resources, &name)
                && any(&rule.verbs, verb)
        };
        if rules.iter().any(allows) {
            return Ok(());
        }
        let scope = if path.namespace.is_empty() {
            "at the cluster scope".to_owned()
        } else {
            format!("in the namespace {:?}", path.namespace)
        };
        let why = format!(
            "User {user:?} cannot {verb} resource {name:?} in API group {:?} {scope}",
            resource.group
        );
        Err(Failure::forbidden(resource, &path.name, &why))
    }
}
