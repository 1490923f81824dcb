//! One file a command.

pub mod ctl;
pub mod info;
pub mod restore;
pub mod run;
pub mod snapshot;
pub mod template;
