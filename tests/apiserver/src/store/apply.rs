//! Server-side apply on the store: the object is made if there is none.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{Object, Part, State, Target, Write};
use crate::{
    admission::{custom, schema},
    failure::{Cause, Failure},
    json::text,
    patch::apply,
};

impl State {
    /// Applies all that a manager wants of an object; tells whether it was made.
    pub(crate) fn apply(
        &mut self,
        target: &Target,
        wanted: &Value,
        manager: &str,
        force: bool,
        write: &Write,
    ) -> Result<(bool, Arc<Object>), Failure> {
        if manager.is_empty() {
            let why = "is required for apply patch";
            let cause = Cause::required("fieldManager", why);
            return Err(Failure::bad_options("PatchOptions", cause));
        }
        let given = text(&wanted["metadata"]["name"]);
        if !given.is_empty() && given != target.name {
            let why = format!("the name of the object ({given}) is not that of the URL");
            return Err(Failure::bad_request(why));
        }
        // Nobody can own what no object has: an apply is strict whatever validation is asked for.
        let definition = self.definition(target.resource);
        let of = definition.as_ref();
        let of = of.and_then(|of| custom::schema(of, target.resource.version));
        let unknown = schema::take_unknown(target.resource, of, &mut wanted.clone());
        if !unknown.is_empty() {
            let place = (text(&wanted["metadata"]["namespace"]), target.name.as_str());
            return Err(Failure::untyped(target.resource, place, &unknown));
        }
        let found = self
            .find(target.resource, &target.namespace, &target.name)
            .cloned();
        // Each part of an object has owners of its own.
        let owner = if write.part == Part::Status {
            format!("{manager}/status")
        } else {
            manager.into()
        };
        let (created, stored, managers) = match found {
            None if write.part == Part::Status => {
                return Err(Failure::not_found(target.resource, &target.name));
            }
            None => {
                let mut object = wanted.clone();
                if let Some(metadata) = crate::json::object_at(&mut object, "metadata") {
                    metadata.insert("name".into(), json!(target.name));
                    metadata.insert("namespace".into(), json!(target.namespace));
                }
                let mut managers = apply::Managers::new();
                managers.insert(owner, wanted.clone());
                (true, self.create(target.resource, object, write)?, managers)
            }
            Some(current) => {
                let mut managers = self.applied.get(current.uid()).cloned().unwrap_or_default();
                let object = apply::apply(&current, wanted, &owner, force, &mut managers)?;
                (false, self.update(target, object, write)?, managers)
            }
        };
        if !write.dry_run {
            self.applied.insert(stored.uid().to_owned(), managers);
        }
        Ok((created, stored))
    }
}
