//! Snapshots of disks as images in front of them, several commands at one moment, and changes of
//! what a node was opened with.

use super::block_jobs::{self, BlockdevBackup};
use super::blockdev::BlockdevOptions;
use crate::machine::Machine;
use crate::machine::block_jobs::Made;
use crate::qapi::define::Nothing;
use crate::qapi::{self, Error, Result, Type};
use std::collections::VecDeque;
use std::path::PathBuf;

crate::choice! {
    /// Where a new image comes from.
    pub enum NewImageMode {
        /// It is there already.
        Existing = "existing",
        /// It is made, and names the image behind it by its path.
        AbsolutePaths = "absolute-paths",
    }
    /// What becomes of the other actions when one fails later.
    pub enum ActionCompletionMode {
        /// They go on.
        Individual = "individual",
    }
}

crate::object! {
    /// A snapshot with an image that is open.
    pub struct BlockdevSnapshot {
        /// The drive or node in front of which the image comes.
        node: String,
        /// The node of the image.
        overlay: String,
    }
    /// A snapshot with a new image.
    pub struct BlockdevSnapshotSync {
        /// The drive in front of whose image the new one comes.
        device: Option<String>,
        /// The same by its node.
        node_name: Option<String>,
        /// Path of the new image.
        snapshot_file: PathBuf,
        /// Name of its node.
        snapshot_node_name: Option<String>,
        /// Its format; qcow2 if absent.
        format: Option<String>,
        /// Whether it is made.
        mode: Option<NewImageMode>,
    }
    /// Nothing: makes the transaction fail.
    pub struct Abort {}
    /// Data of an action.
    pub struct AbortWrapper {
        /// It.
        data: Abort,
    }
    /// Data of an action.
    pub struct BlockdevBackupWrapper {
        /// It.
        data: BlockdevBackup,
    }
    /// Data of an action.
    pub struct BlockdevSnapshotWrapper {
        /// It.
        data: BlockdevSnapshot,
    }
    /// Data of an action.
    pub struct BlockdevSnapshotSyncWrapper {
        /// It.
        data: BlockdevSnapshotSync,
    }
    /// What holds for all actions.
    pub struct TransactionProperties {
        /// What becomes of the other actions when one fails later.
        completion_mode: Option<ActionCompletionMode>,
    }
}

crate::variants! {
    /// A part of a transaction.
    pub enum TransactionAction by "type" {
        /// Fails.
        Abort(AbortWrapper) = "abort",
        /// `blockdev-backup`.
        BlockdevBackup(BlockdevBackupWrapper) = "blockdev-backup",
        /// `blockdev-snapshot`.
        BlockdevSnapshot(BlockdevSnapshotWrapper) = "blockdev-snapshot",
        /// `blockdev-snapshot-sync`.
        BlockdevSnapshotSync(BlockdevSnapshotSyncWrapper) = "blockdev-snapshot-sync",
    }
}

/// An action that can be done, or undone.
enum Prepared {
    Backup(Made),
    Snapshot { key: String, overlay: String, made: bool },
}

fn prepare(vm: &mut Machine, action: TransactionAction) -> Result<Prepared> {
    match action {
        TransactionAction::Abort(_) => Err(Error::new("Transaction aborted using Abort action")),
        TransactionAction::BlockdevBackup(b) => {
            block_jobs::make_backup(vm, b.data).map(Prepared::Backup)
        }
        TransactionAction::BlockdevSnapshot(s) => {
            let key = vm.find_node(&s.data.node)?.0;
            let overlay = vm.overlay(&s.data.overlay)?;
            Ok(Prepared::Snapshot { key, overlay, made: false })
        }
        TransactionAction::BlockdevSnapshotSync(s) => {
            let s = s.data;
            let wanted = match (s.device, s.node_name) {
                (Some(name), None) | (None, Some(name)) => name,
                _ => return Err(Error::new("give either device or node-name")),
            };
            let key = vm.find_node(&wanted)?.0;
            let make = s.mode != Some(NewImageMode::Existing);
            let format = s.format.as_deref().unwrap_or("qcow2");
            if format != "qcow2" {
                let text = format!("format '{format}' can have nothing behind it; use qcow2");
                return Err(Error::new(text));
            }
            let overlay = vm.new_overlay(&key, &s.snapshot_file, s.snapshot_node_name, make)?;
            Ok(Prepared::Snapshot { key, overlay, made: true })
        }
    }
}

/// Does all or nothing, at one moment of the guest's.
fn transaction(vm: &mut Machine, actions: Vec<TransactionAction>) -> Result<Nothing> {
    let mut prepared = Vec::new();
    for action in actions {
        match prepare(vm, action) {
            Ok(p) => prepared.push(p),
            Err(e) => {
                undo(vm, prepared);
                return Err(e);
            }
        }
    }
    let mut left: VecDeque<Prepared> = prepared.into();
    let result = vm.at_once(|vm| {
        while let Some(p) = left.pop_front() {
            match p {
                Prepared::Backup(made) => vm.launch(made),
                Prepared::Snapshot { key, overlay, .. } => vm.put_in_front(&key, &overlay)?,
            }
        }
        Ok(())
    });
    if result.is_err() {
        undo(vm, left.into());
    }
    result.map(|()| Nothing {})
}

fn undo(vm: &mut Machine, prepared: Vec<Prepared>) {
    for p in prepared.into_iter().rev() {
        match p {
            Prepared::Backup(made) => vm.give_up(made),
            Prepared::Snapshot { overlay, made: true, .. } => drop(vm.remove_node(&overlay)),
            Prepared::Snapshot { .. } => {}
        }
    }
}

fn reopen(vm: &mut Machine, options: Vec<BlockdevOptions>) -> Result<Nothing> {
    for o in options {
        let nodes = crate::qemu::block_nodes(&o.write().to_string()).map_err(qapi::faults)?;
        // The last is the one that is meant; what is below it was defined inside it.
        if let Some(node) = nodes.into_iter().next_back() {
            vm.reopen_node(node)?;
        }
    }
    Ok(Nothing {})
}

crate::commands! {
    /// Puts an image that is open as a node in front of a disk's: the guest goes on in it, and what
    /// was there stays as it is.
    fn "blockdev-snapshot" ["allow-write-only-overlay"] (cx, [ s: BlockdevSnapshot ]) -> Nothing {
        let data = BlockdevSnapshotWrapper { data: s };
        transaction(cx.vm, vec![TransactionAction::BlockdevSnapshot(data)])
    }

    /// The same with an image that is made.
    fn "blockdev-snapshot-sync"(cx, [ s: BlockdevSnapshotSync ]) -> Nothing {
        let data = BlockdevSnapshotSyncWrapper { data: s };
        transaction(cx.vm, vec![TransactionAction::BlockdevSnapshotSync(data)])
    }

    /// Does several things at one moment, or none of them.
    fn "transaction"(cx, {
        /// The things.
        actions: Vec<TransactionAction>,
        /// What holds for all.
        properties: Option<TransactionProperties>,
    }) -> Nothing {
        let _ = properties;
        transaction(cx.vm, actions)
    }

    /// Changes what nodes were opened with: `read-only` and `backing`.
    fn "blockdev-reopen"(cx, {
        /// The nodes, with all their options.
        options: Vec<BlockdevOptions>,
    }) -> Nothing { reopen(cx.vm, options) }
}
