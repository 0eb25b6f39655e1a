//! Custom resources: the definition that the manifests bring, and what it takes.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::eventually;
use serde_json::{Value, json};

use crate::{World, refused, refused_with};

const DEFINITION: &str = include_str!("../../../../manifests/crds/clusternetworkpolicies.yaml");
const PATH: &str = "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies";
const NAME: &str = "clusternetworkpolicies.policy.networking.k8s.io";
const LIMIT: Duration = Duration::from_secs(15);
const MERGE: &str = "application/merge-patch+json";

/// Installs the definition, and waits until it is served.
fn install(world: &World) -> Result<()> {
    world.cluster.apply(DEFINITION)?;
    let name = format!("crd/{NAME}");
    let wait = [
        "wait",
        "--for=condition=Established",
        "--timeout=15s",
        &name,
    ];
    world.cluster.kubectl(&wait)?;
    eventually(LIMIT, || {
        let answer = world.admin.ask(&format!("GET {PATH}"))?;
        ensure!(answer.code == 200, "{}", answer.text);
        Ok(())
    })
}

fn policy(name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": name}, "spec": spec,
    })
}

/// A policy that is right, with a further field.
fn with(key: &str, value: Value) -> Value {
    let mut spec = json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}});
    spec[key] = value;
    policy("p", spec)
}

fn egress(networks: Value, port: Value) -> Value {
    let rule = json!({
        "action": "Pass",
        "to": [{"networks": networks}],
        "protocols": [{"tcp": {"destinationPort": port}}],
    });
    with("egress", json!([rule]))
}

/// What of a policy is refused, sorted: fields with their messages.
fn causes(world: &World, policy: &Value) -> Result<Vec<String>> {
    let answer = world
        .admin
        .json(&format!("POST {PATH}?dryRun=All"), policy)?;
    if answer.code == 201 {
        return Ok(Vec::new());
    }
    let told = answer.json();
    ensure!(
        answer.code == 422 && told["reason"] == "Invalid",
        "{}",
        answer.text
    );
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let causes = told["details"]["causes"].as_array().context("no causes")?;
    let causes = causes.iter().map(|cause| {
        format!(
            "{} {}: {}",
            text(&cause["reason"]),
            text(&cause["field"]),
            text(&cause["message"])
        )
    });
    let mut causes: Vec<_> = causes.collect();
    causes.sort_unstable();
    Ok(causes)
}

pub(crate) fn a_definition_is_established(world: &World) -> Result<()> {
    install(world)?;
    let path = format!("GET /apis/apiextensions.k8s.io/v1/customresourcedefinitions/{NAME}");
    let definition = world.admin.ask(&path)?.json();
    let status = &definition["status"];
    ensure!(
        status["acceptedNames"]["kind"] == "ClusterNetworkPolicy",
        "{status}"
    );
    ensure!(status["storedVersions"] == json!(["v1alpha2"]), "{status}");
    let kinds = world
        .cluster
        .kubectl(&["api-resources", "--api-group=policy.networking.k8s.io"])?;
    ensure!(kinds.contains("cnp"), "{kinds}");
    // Another name than its parts say.
    let mut other = definition.clone();
    let stars = "stars.policy.networking.k8s.io";
    other["metadata"] = json!({"name": stars});
    let answer = world.admin.json(
        "POST /apis/apiextensions.k8s.io/v1/customresourcedefinitions?dryRun=All",
        &other,
    )?;
    refused(
        &answer,
        422,
        "Invalid",
        "CustomResourceDefinition.apiextensions.k8s.io \"stars.policy.networking.k8s.io\" is \
         invalid: [metadata.name: Invalid value: \"stars.policy.networking.k8s.io\": must be \
         spec.names.plural+\".\"+spec.group, metadata.annotations[api-approved.kubernetes.io]: \
         Required value: protected groups must have approval annotation \
         \"api-approved.kubernetes.io\", see https://github.com/kubernetes/enhancements/pull/1111]",
    )
}

pub(crate) fn fields_that_no_schema_has_are_pruned_or_refused(world: &World) -> Result<()> {
    install(world)?;
    let mut odd = with("moon", json!("full"));
    odd["metadata"]["color"] = json!("red");
    odd["metadata"]["name"] = json!("odd");
    let answer = world
        .admin
        .json(&format!("POST {PATH}?fieldValidation=Strict"), &odd)?;
    refused(
        &answer,
        400,
        "BadRequest",
        "ClusterNetworkPolicy in version \"v1alpha2\" cannot be handled as a ClusterNetworkPolicy: \
         strict decoding error: unknown field \"metadata.color\", unknown field \"spec.moon\"",
    )?;
    let answer = world.admin.json(&format!("POST {PATH}"), &odd)?;
    ensure!(answer.code == 201, "{}", answer.text);
    let mut warnings = answer.warnings.clone();
    warnings.sort_unstable();
    ensure!(
        warnings
            == [
                "299 - \"unknown field \\\"metadata.color\\\"\"",
                "299 - \"unknown field \\\"spec.moon\\\"\"",
            ],
        "{warnings:?}"
    );
    ensure!(answer.json()["spec"]["moon"].is_null(), "{}", answer.text);
    let path = format!("{PATH}/odd");
    let patch = r#"{"spec": {"tier": "Baseline", "moon": "new"}}"#;
    let strict = format!("PATCH {path}?fieldValidation=Strict");
    let answer = world.admin.send(&strict, MERGE, patch)?;
    refused_with(
        &answer,
        422,
        "Invalid",
        &[
            " \"\" is invalid: patch: Invalid value: ",
            "strict decoding error: unknown field \"spec.moon\"",
        ],
    )?;
    let answer = world
        .admin
        .send(&format!("PATCH {path}"), MERGE, patch)?
        .json();
    ensure!(answer["spec"]["tier"] == "Baseline" && answer["spec"]["moon"].is_null());
    ensure!(answer["metadata"]["generation"] == 2, "{answer}");
    // Only an apply merges lists of custom resources by key.
    let strategic = "application/strategic-merge-patch+json";
    let answer = world
        .admin
        .send(&format!("PATCH {path}"), strategic, patch)?;
    ensure!(answer.code == 415, "{}", answer.text);
    let apply = "application/apply-patch+yaml";
    let mut other = with("moon", json!("full"));
    other["metadata"]["name"] = json!("other");
    let answer = world.admin.send(
        &format!("PATCH {PATH}/other?fieldManager=test"),
        apply,
        other,
    )?;
    refused(
        &answer,
        500,
        "",
        "failed to create typed patch object (/other; policy.networking.k8s.io/v1alpha2, \
         Kind=ClusterNetworkPolicy): .spec.moon: field not declared in schema",
    )?;
    world.admin.ask(&format!("DELETE {path}")).map(drop)
}

const UNASKED: &str = "FieldValueInvalid <nil>: Invalid value: null: some validation rules were not \
                       checked because the object was invalid; correct the existing errors to \
                       complete validation";

pub(crate) fn values_are_held_to_the_schema(world: &World) -> Result<()> {
    install(world)?;
    let peer = |peer: Value| json!([{"action": "Pass", "from": peer}]);
    let many: Vec<_> = (0..26).map(|_| json!({"namespaces": {}})).collect();
    let long = "x".repeat(101);
    for (policy, expected) in [
        (with("priority", json!(1000)), vec![]),
        (with("ingress", json!([])), vec![]),
        (with("ingress", Value::Null), vec![]),
        (
            with("priority", json!(1001)),
            vec![
                "FieldValueInvalid spec.priority: Invalid value: 1001: spec.priority in body should be less than or equal to 1000",
            ],
        ),
        (
            with("priority", json!(-1)),
            vec![
                "FieldValueInvalid spec.priority: Invalid value: -1: spec.priority in body should be greater than or equal to 0",
            ],
        ),
        (
            with("priority", json!(1.5)),
            vec![
                UNASKED,
                "FieldValueTypeInvalid spec.priority: Invalid value: \"number\": spec.priority in body must be of type integer: \"number\"",
            ],
        ),
        (
            with("tier", json!("Up")),
            vec![
                UNASKED,
                "FieldValueNotSupported spec.tier: Unsupported value: \"Up\": supported values: \"Admin\", \"Baseline\"",
            ],
        ),
        (
            with("tier", Value::Null),
            vec![UNASKED, "FieldValueRequired spec.tier: Required value"],
        ),
        (
            with("subject", json!({})),
            vec![
                "FieldValueInvalid spec.subject: Invalid value: 0: spec.subject in body should have at least 1 properties",
            ],
        ),
        (
            with("subject", json!({"namespaces": {"matchLabels": {"a": 1}}})),
            vec![
                UNASKED,
                "FieldValueTypeInvalid spec.subject.namespaces.matchLabels.a: Invalid value: \"integer\": spec.subject.namespaces.matchLabels.a in body must be of type string: \"integer\"",
            ],
        ),
        (
            with("ingress", peer(json!([]))),
            vec![
                "FieldValueInvalid spec.ingress[0].from: Invalid value: 0: spec.ingress[0].from in body should have at least 1 items",
            ],
        ),
        (
            with("ingress", peer(json!(many))),
            vec![
                UNASKED,
                "FieldValueTooMany spec.ingress[0].from: Too many: 26: must have at most 25 items",
            ],
        ),
        (
            with(
                "ingress",
                peer(json!([{"namespaces": {}, "pods": {"podSelector": {}}}])),
            ),
            vec![
                UNASKED,
                "FieldValueTooMany spec.ingress[0].from[0]: Too many: 2: must have at most 1 item",
            ],
        ),
        (
            with(
                "ingress",
                json!([{"action": "Pass", "name": long, "from": [{"namespaces": {}}]}]),
            ),
            vec![
                UNASKED,
                "FieldValueTooLong spec.ingress[0].name: Too long: may not be more than 100 bytes",
            ],
        ),
        (
            with("ingress", json!({})),
            vec![
                UNASKED,
                "FieldValueTypeInvalid spec.ingress: Invalid value: \"object\": spec.ingress in body must be of type array: \"object\"",
            ],
        ),
        (
            policy("p", json!({})),
            vec![
                UNASKED,
                "FieldValueRequired spec.priority: Required value",
                "FieldValueRequired spec.subject: Required value",
                "FieldValueRequired spec.tier: Required value",
            ],
        ),
        (
            policy("p", json!([])),
            vec![
                UNASKED,
                "FieldValueTypeInvalid spec: Invalid value: \"array\": spec in body must be of type object: \"array\"",
            ],
        ),
    ] {
        let told = causes(world, &policy).with_context(|| policy.to_string())?;
        ensure!(told == expected, "{policy}: {told:#?}");
    }
    // Of labels that are none the object cannot be decoded.
    let mut labels = with("priority", json!(1));
    labels["metadata"]["labels"] = json!({"a": 1});
    let answer = world
        .admin
        .json(&format!("POST {PATH}?dryRun=All"), &labels)?;
    ensure!(answer.code == 400, "{}", answer.text);
    // The status is held to the schema as well.
    world.made(PATH, &with("priority", json!(1)))?;
    let patch = r#"{"status": {"conditions": [
        {"type": "Known", "status": "Maybe", "lastTransitionTime": "yesterday"}]}}"#;
    let answer = world
        .admin
        .send(&format!("PATCH {PATH}/p/status"), MERGE, patch)?;
    ensure!(
        answer.code == 422
            && answer
                .message()
                .contains("status.conditions[0].status: Unsupported value: \"Maybe\"")
            && answer
                .message()
                .contains("lastTransitionTime in body must be of type date-time: \"yesterday\"")
            && answer
                .message()
                .contains("status.conditions[0].reason: Required value"),
        "{}",
        answer.text
    );
    world.admin.ask(&format!("DELETE {PATH}/p")).map(drop)
}

pub(crate) fn rules_are_asked(world: &World) -> Result<()> {
    install(world)?;
    let port = json!({"number": 80});
    let networks = json!(["10.0.0.0/8", "2001:db8::/32"]);
    let range = "spec.egress[0].protocols[0].tcp.destinationPort.range";
    let upside_down = format!(
        "FieldValueInvalid {range}: Invalid value: \"object\": a range ends above its start"
    );
    let upside_down = upside_down.as_str();
    let not_a_block = "FieldValueInvalid spec.egress[0].to[0].networks[0]: Invalid value: \"string\": \
                       not an address block";
    for (policy, expected) in [
        (egress(networks.clone(), port.clone()), vec![]),
        (
            egress(networks.clone(), json!({"range": {"start": 3, "end": 5}})),
            vec![],
        ),
        (
            egress(networks.clone(), json!({"range": {"start": 3, "end": 3}})),
            vec![upside_down],
        ),
        (egress(json!(["10.0.0.0"]), port.clone()), vec![not_a_block]),
        (
            egress(
                json!(["10.0.0.0/33"]),
                json!({"range": {"start": 5, "end": 3}}),
            ),
            vec![upside_down, not_a_block],
        ),
        (
            egress(json!(["10.0.0.0/8", "10.0.0.0/8"]), port.clone()),
            vec![
                "FieldValueDuplicate spec.egress[0].to[0].networks[1]: Duplicate value: \"10.0.0.0/8\"",
            ],
        ),
        (
            egress(json!(["10.0.0.0"]), json!({"range": {"start": 3}})),
            vec![
                UNASKED,
                "FieldValueRequired spec.egress[0].protocols[0].tcp.destinationPort.range.end: Required value",
            ],
        ),
    ] {
        let told = causes(world, &policy).with_context(|| policy.to_string())?;
        ensure!(told == expected, "{policy}: {told:#?}");
    }
    Ok(())
}
