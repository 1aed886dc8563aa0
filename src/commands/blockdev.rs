//! Block nodes that come and go while the machine runs.

use crate::machine::Machine;
use crate::qapi::define::Nothing;
use crate::qapi::{self, Error, Result, Type};
use serde_json::Value;

crate::object! {
    /// How a node uses the host's cache.
    pub struct BlockdevCacheOptions {
        /// Not at all.
        direct: Option<bool>,
        /// Flushes do nothing.
        no_flush: Option<bool>,
    }
    /// A file.
    pub struct BlockdevOptionsFile {
        /// Name of the node.
        node_name: Option<String>,
        /// Path of the file.
        filename: String,
        /// Who works on requests: `threads` or `io_uring`.
        aio: Option<String>,
        /// The guest cannot write.
        read_only: Option<bool>,
        /// Accepted: a file is opened as `read-only` says.
        auto_read_only: Option<bool>,
        /// `unmap` or `ignore`.
        discard: Option<String>,
        /// `off`, `on` or `unmap`.
        detect_zeroes: Option<String>,
        /// How the host's cache is used.
        cache: Option<BlockdevCacheOptions>,
        /// Accepted: images are always locked.
        locking: Option<String>,
        /// Accepted: there is no migration that would drop caches.
        drop_cache: Option<bool>,
    }
    /// A format on a file.
    pub struct BlockdevOptionsFormat {
        /// Name of the node.
        node_name: Option<String>,
        /// Name of the node of the file, or that node's definition.
        file: Value,
        /// Null: what stands in the image about another behind it is not followed.
        backing: Option<Value>,
        /// The guest cannot write.
        read_only: Option<bool>,
        /// Accepted: an image is opened as `read-only` says.
        auto_read_only: Option<bool>,
        /// `unmap` or `ignore`.
        discard: Option<String>,
        /// `off`, `on` or `unmap`.
        detect_zeroes: Option<String>,
        /// How the host's cache is used.
        cache: Option<BlockdevCacheOptions>,
    }
}

crate::variants! {
    /// A block node.
    pub enum BlockdevOptions by "driver" {
        /// The bytes of a file.
        File(BlockdevOptionsFile) = "file",
        /// The raw format.
        Raw(BlockdevOptionsFormat) = "raw",
        /// The qcow2 format.
        Qcow2(BlockdevOptionsFormat) = "qcow2",
    }
}

fn add(vm: &mut Machine, options: BlockdevOptions) -> Result<Nothing> {
    let node_name = match &options {
        BlockdevOptions::File(f) => &f.node_name,
        BlockdevOptions::Raw(f) | BlockdevOptions::Qcow2(f) => &f.node_name,
    };
    let name = node_name.as_deref().unwrap_or_default();
    if name.is_empty() {
        return Err(Error::new("'node-name' must be specified for the root node"));
    }
    if !qapi::is_well_formed_id(name) || name.len() > 31 {
        return Err(Error::new(format!("Invalid node-name: '{name}'")));
    }
    let nodes = crate::qemu::block_nodes(&options.write().to_string()).map_err(qapi::faults)?;
    let mut added: Vec<String> = Vec::new();
    for node in nodes {
        let name = node.name.clone();
        if let Err(e) = vm.add_node(node) {
            added.iter().rev().for_each(|n| drop(vm.remove_node(n)));
            return Err(e);
        }
        added.push(name);
    }
    Ok(Nothing {})
}

crate::commands! {
    /// Opens an image as a block node, for a device.
    fn "blockdev-add"(cx, [ options: BlockdevOptions ]) -> Nothing { add(cx.vm, options) }

    /// Closes a block node that nobody uses.
    fn "blockdev-del"(cx, {
        /// Its name.
        node_name: String,
    }) -> Nothing { cx.vm.remove_node(&node_name).map(|()| Nothing {}) }
}
