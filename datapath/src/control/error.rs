// SPDX-License-Identifier: GPL-2.0-or-later
//! Why a control request was refused, as the protocol tells it.

use crate::cbt::CbtError;
use serde::Serialize;
use std::io;

#[derive(Debug, Serialize)]
pub struct Refusal {
    pub code: &'static str,
    pub message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub errno: Option<i32>,
}

pub type Result<T> = std::result::Result<T, Refusal>;

macro_rules! refusals {
    ($($name:ident $code:literal),+ $(,)?) => {
        impl Refusal {
            $(pub fn $name(message: impl Into<String>) -> Self {
                Self { code: $code, message: message.into(), errno: None }
            })+
        }
    };
}

refusals! {
    bad_request "bad-request",
    protocol "protocol",
    not_found "not-found",
    exists "exists",
    busy "busy",
    invalid "invalid",
    invalid_state "invalid-state",
    timed_out "timed-out",
    limit "limit",
}

impl Refusal {
    /// A system call failed on `what`.
    pub fn io(what: &str, error: &io::Error) -> Self {
        let errno = error.raw_os_error();
        let code = match errno {
            Some(libc::ENOSPC | libc::EDQUOT) => "no-space",
            _ => "io",
        };
        Self {
            code,
            message: format!("{what}: {}", words(error)),
            errno: Some(errno.unwrap_or(libc::EIO)),
        }
    }
}

impl From<CbtError> for Refusal {
    fn from(error: CbtError) -> Self {
        Self::invalid(error.to_string())
    }
}

/// The kernel's words for an error, without Rust's "(os error N)".
pub fn words(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    text.to_lowercase()
}
