//! The API of CNSMO.
//!
//! - [`pb`]: code generated from `proto/`, what goes over the wire.
//! - [`model`]: the same resources as types that only hold valid values. Code past the edge of a program uses these.
//! - [`digest`]: proves that core and agent hold the same set.
//! - [`manifest`]: the YAML and JSON files that operators write.

// The generator is a binary of this package and must not need what it generates.
#![cfg(not(feature = "codegen"))]

pub mod digest;
pub mod manifest;
pub mod model;

/// Descriptors of all services, with the comments of the `.proto` files.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Generated from `proto/` by `cargo xtask codegen`.
#[expect(
    missing_docs,
    clippy::allow_attributes_without_reason,
    clippy::allow_attributes,
    reason = "generated; the documentation is in the .proto files"
)]
pub mod pb {
    /// Core <-> agent.
    pub mod agent {
        /// Version 1.
        pub mod v1 {
            include!("generated/cnsmo.agent.v1.rs");
        }
        pub use v1::*;
    }
    /// Load balancers.
    pub mod balancer {
        /// Version 1.
        pub mod v1 {
            include!("generated/cnsmo.balancer.v1.rs");
        }
        pub use v1::*;
    }
    /// Packets and flows of the VMs.
    pub mod flow {
        /// Version 1.
        pub mod v1 {
            include!("generated/cnsmo.flow.v1.rs");
        }
        pub use v1::*;
    }
    /// Enrolment and join tokens.
    pub mod identity {
        /// Version 1.
        pub mod v1 {
            include!("generated/cnsmo.identity.v1.rs");
        }
        pub use v1::*;
    }
    /// Overlay networks.
    pub mod network {
        /// Version 1.
        pub mod v1 {
            include!("generated/cnsmo.network.v1.rs");
        }
        pub use v1::*;
    }
    /// VMs.
    pub mod node {
        /// Version 1.
        pub mod v1 {
            include!("generated/cnsmo.node.v1.rs");
        }
        pub use v1::*;
    }
    /// Policies.
    pub mod policy {
        /// Version 1.
        pub mod v1 {
            include!("generated/cnsmo.policy.v1.rs");
        }
        pub use v1::*;
    }
    /// What operators call.
    pub mod resource {
        /// Version 1.
        pub mod v1 {
            include!("generated/cnsmo.resource.v1.rs");
        }
        pub use v1::*;
    }
    /// The core itself.
    pub mod admin {
        /// Version 1.
        pub mod v1 {
            include!("generated/cnsmo.admin.v1.rs");
        }
        pub use v1::*;
    }
    /// Messages.
    pub mod bus {
        /// Version 1.
        pub mod v1 {
            include!("generated/cnsmo.bus.v1.rs");
        }
        pub use v1::*;
    }
    /// Instances of services.
    pub mod catalog {
        /// Version 1.
        pub mod v1 {
            include!("generated/cnsmo.catalog.v1.rs");
        }
        pub use v1::*;
    }
    /// Instances of services on VMs, kept running.
    pub mod deployment {
        /// Version 1.
        pub mod v1 {
            include!("generated/cnsmo.deployment.v1.rs");
        }
        pub use v1::*;
    }
    /// Steering services.
    pub mod service {
        /// Version 1.
        pub mod v1 {
            include!("generated/cnsmo.service.v1.rs");
        }
        pub use v1::*;
    }
    /// What happened.
    pub mod event {
        /// Version 1.
        pub mod v1 {
            include!("generated/cnsmo.event.v1.rs");
        }
        pub use v1::*;
    }
    /// Keys, revisions, leases.
    pub mod state {
        /// Version 1.
        pub mod v1 {
            include!("generated/cnsmo.state.v1.rs");
        }
        pub use v1::*;
    }
    /// Shared by all resources.
    pub mod meta {
        /// Version 1.
        pub mod v1 {
            include!("generated/cnsmo.meta.v1.rs");
        }
        pub use v1::*;
    }
}
