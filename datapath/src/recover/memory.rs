// SPDX-License-Identifier: GPL-2.0-or-later
//! Memory that was left, copied on demand into memory of our own: the old is sealed against being written by us, and
//! stays as it was for a process that follows should we die before all is copied.

use crate::control::keeping::VERSION;
use crate::mem::Shared;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

#[derive(Debug)]
pub struct Memory {
    left: BTreeMap<u64, File>,
    copies: BTreeMap<u64, Arc<Shared>>,
}

impl Memory {
    pub fn new(left: BTreeMap<u64, File>) -> Self {
        Self {
            left,
            copies: BTreeMap::new(),
        }
    }

    /// The copy of memory `id`: always the same one, as those who shared the old share the new.
    pub fn shared(&mut self, id: u64, name: &CStr) -> io::Result<Arc<Shared>> {
        if let Some(copy) = self.copies.get(&id) {
            return Ok(Arc::clone(copy));
        }
        let copy = Arc::new(self.owned(id, name)?);
        self.copies.insert(id, Arc::clone(&copy));
        Ok(copy)
    }

    /// A copy for one owner.
    pub fn owned(&mut self, id: u64, name: &CStr) -> io::Result<Shared> {
        let file = self.left.get(&id).ok_or(io::ErrorKind::NotFound)?;
        Shared::copy_of(name, file)
    }
}

/// Whether it is this process that lacks something, and not what was left: the next one may have more luck.
pub fn passes(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    matches!(errno, Some(libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::EAGAIN))
}

/// What a conf says. Raised (InvalidData) when it is of a version that is not known.
pub fn conf<T: DeserializeOwned>(file: &File) -> io::Result<T> {
    let mut text = vec![0; file.metadata()?.len() as usize];
    file.read_exact_at(&mut text, 0)?;
    let value: serde_json::Value = serde_json::from_slice(&text)?;
    if value["version"] != VERSION {
        let text = format!("written by another version of the data path ({})", value["version"]);
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(serde_json::from_value(value)?)
}
