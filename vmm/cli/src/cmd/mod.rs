//! One file a command.

pub mod info;
pub mod run;
