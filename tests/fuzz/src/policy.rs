//! What operators and cores send: manifests as text, resources as protobuf. Nothing panics, and what is taken is kept as it
//! was taken.

use std::fmt::Debug;

use cnsmo_proto::{
    manifest::{self, Original},
    model::{Deployment, FirewallPolicy, LoadBalancer, Name, Network},
    pb::resource::{Resource, resource::Resource as Kind},
};
use prost::Message as _;

/// The first byte says how the others are read.
pub fn run(bytes: &[u8]) {
    let Some((how, bytes)) = bytes.split_first() else { return };
    match how % 3 {
        0 => text("f.yaml", bytes, &Original::default()),
        1 => {
            let name = Name::new("rules").ok();
            text("f.json", bytes, &Original { name, ..Original::default() });
        }
        _ => {
            if let Ok(resource) = Resource::decode(bytes) {
                judge(&resource, false);
            }
        }
    }
}

fn text(file: &str, bytes: &[u8], original: &Original) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match manifest::parse(file, text, original) {
        Ok(parsed) => parsed.resources.iter().for_each(|resource| judge(resource, true)),
        Err(errors) => {
            assert!(errors.iter().next().is_some(), "refused without a reason");
            assert!(errors.to_string().contains(file), "a reason without the file's name");
        }
    }
}

/// `is_checked`: the manifest was taken, so the model must take it.
fn judge(resource: &Resource, is_checked: bool) {
    let again = Resource::decode(resource.encode_to_vec().as_slice());
    assert_eq!(again.as_ref(), Ok(resource), "lost in encoding");
    match &resource.resource {
        Some(Kind::FirewallPolicy(it)) => stable::<FirewallPolicy, _>(it.spec.as_ref(), is_checked),
        Some(Kind::Network(it)) => stable::<Network, _>(it.spec.as_ref(), is_checked),
        Some(Kind::LoadBalancer(it)) => stable::<LoadBalancer, _>(it.spec.as_ref(), is_checked),
        Some(Kind::Deployment(it)) => stable::<Deployment, _>(it.spec.as_ref(), is_checked),
        Some(Kind::Node(_)) | None => {}
    }
}

/// What the model took, told again by it, is the same to it.
fn stable<M, P>(spec: Option<&P>, is_checked: bool)
where
    P: Clone + for<'a> From<&'a M>,
    M: TryFrom<P> + PartialEq + Debug,
    M::Error: Debug,
{
    let Some(spec) = spec else { return };
    match M::try_from(spec.clone()) {
        Ok(model) => {
            let again = M::try_from(P::from(&model));
            assert!(
                again.as_ref().is_ok_and(|again| *again == model),
                "{model:?} became {again:?}"
            );
        }
        Err(error) => assert!(!is_checked, "the manifest was taken, the model says {error:?}"),
    }
}
