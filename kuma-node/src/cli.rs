//! The commands. (Declared here until the command line is there.)

pub mod config;
pub mod token;
