//! Jobs on disks, made from what clients ask for: which images, what must see the guest's changes,
//! and what becomes of the chain in the end.

use super::Machine;
use super::block_nodes::{chain, failed};
use super::jobs::{Fared, Finish, Outcome, Wish, Work};
use crate::commands::jobs::JobType;
use crate::qapi::{Error, Result};
use std::sync::Arc;
use tandem_backends::block::drive::{Drive, Witness};
use tandem_backends::block::job::backup::{self, Backup};
use tandem_backends::block::job::mirror::{self, End, Mirror};
use tandem_backends::block::job::stream::Stream;
use tandem_backends::block::job::{Ending, OnError, commit, depth_above, ending};
use tandem_backends::block::{self, Image, Preallocation};

/// What is common to all jobs.
pub struct Start {
    /// Its name and habits.
    pub wish: Wish,
    /// Bytes a second, at most; 0: no limit.
    pub speed: u64,
    /// What is done about errors of source and target.
    pub policy: [OnError; 2],
}

/// A job that is made and not started.
pub struct Made {
    serial: u64,
    /// Lets the job see changes from now on.
    arm: Option<Box<dyn FnOnce()>>,
}

/// Which images a commit is about.
#[derive(Default)]
pub struct Layers {
    /// The frontmost image that is committed; the one in use if absent.
    pub top: Option<String>,
    /// The image that gets the data; the last of the chain if absent.
    pub base: Option<String>,
    /// What the image in front of `top` names as the one behind it.
    pub backing_file: Option<String>,
}

fn fared(result: std::result::Result<(), block::job::Halt>) -> Fared {
    Ok(match ending(result)? {
        Ending::Done => Outcome::Done { replace: false },
        Ending::Cancelled => Outcome::Cancelled,
    })
}

fn writes(image: &Arc<dyn Image>, on: bool) -> Result<()> {
    image.set_writable(on).map_err(failed)
}

/// Ends the seeing of changes.
fn dismiss(drive: &Arc<Drive>, witness: &Arc<dyn Witness>) {
    drive.still().dismiss(witness);
}

/// Puts `base` behind `image`, which names it from then on as `name` if that is given.
fn put_behind(
    image: &Arc<dyn Image>,
    base: Option<&Arc<dyn Image>>,
    name: Option<&str>,
) -> Result<()> {
    let layers = image.layered().ok_or_else(|| Error::new("the image can have nothing behind"))?;
    let was_writable = image.writable().is_some();
    if !was_writable {
        writes(image, true)?;
    }
    let path = base.map(|b| b.path().display().to_string());
    let format = base.map(|b| b.describe().format);
    let named = base.is_some().then(|| name.or(path.as_deref())).flatten();
    layers.rename_backing(named, format).map_err(failed)?;
    layers.set_backing(base.cloned());
    if !was_writable {
        writes(image, false)?;
    }
    Ok(())
}

impl Machine {
    /// Starts a job.
    pub fn launch(&mut self, made: Made) {
        if let Some(arm) = made.arm {
            arm();
        }
        self.run_job(made.serial);
    }

    /// Gives up a job that was not started.
    pub fn give_up(&mut self, made: Made) {
        self.job_abort(made.serial, None);
    }

    /// The name of a job whose client gave none: that of the drive.
    pub fn job_id(&self, given: Option<String>, device: &str) -> Result<String> {
        if let Some(id) = given {
            return Ok(id);
        }
        let (key, _) = self.find_node(device)?;
        let drives = &self.config.drives;
        let is_drive = drives.iter().any(|d| d.id.as_deref() == Some(&*key) && !d.is_node());
        Ok(if is_drive { key } else { String::new() })
    }

    /// Source and target of a copy.
    #[allow(clippy::type_complexity)]
    fn pair(
        &self,
        device: &str,
        target: &str,
    ) -> Result<((String, Arc<Drive>), (String, Arc<Drive>))> {
        let (source, to) = (self.find_node(device)?, self.find_node(target)?);
        if source.0 == to.0 {
            return Err(Error::new("Source and target cannot be the same"));
        }
        self.must_be_free(&to.0)?;
        if to.1.read_only() {
            return Err(Error::new(format!("Block node '{}' is read-only", to.0)));
        }
        if to.1.size() != source.1.size() {
            return Err(Error::new("Source and target image have different sizes"));
        }
        Ok((source, to))
    }

    fn must_not_change(&self, key: &str) -> Result<()> {
        match self.jobs.changing(key) {
            Some(job) => Err(Error::new(format!(
                "Node '{key}' is busy: block device is in use by block job: {job}"
            ))),
            None => Ok(()),
        }
    }

    /// `blockdev-backup`.
    pub fn make_backup(
        &mut self,
        device: &str,
        target: &str,
        extent: backup::Extent,
        start: Start,
    ) -> Result<Made> {
        let draft = self.draft_job(start.wish, start.speed, start.policy)?;
        let (source, to) = self.pair(device, target)?;
        self.must_not_change(&source.0)?;
        let job = Backup::new(source.1.image(), to.1.image(), extent, draft.control.clone());
        let witness: Arc<dyn Witness> = job.clone();
        let (drive, seen) = (source.1.clone(), witness.clone());
        let finish: Finish = Box::new(move |_, _| {
            dismiss(&drive, &seen);
            Ok(())
        });
        let mine = job.clone();
        let work: Work = Box::new(move || fared(mine.run()));
        let serial = self.create_job(draft, vec![source.0, to.0], None, work, finish);
        let arm = move || {
            let still = source.1.still();
            job.prepare();
            still.admit(witness);
        };
        Ok(Made { serial, arm: Some(Box::new(arm)) })
    }

    /// `blockdev-mirror`.
    pub fn make_mirror(
        &mut self,
        device: &str,
        target: &str,
        extent: mirror::Extent,
        shape: (Option<u64>, bool),
        start: Start,
    ) -> Result<Made> {
        let draft = self.draft_job(start.wish, start.speed, start.policy)?;
        let (source, to) = self.pair(device, target)?;
        self.must_not_change(&source.0)?;
        self.mirror_job(draft, source, to, extent, shape, false)
    }

    fn mirror_job(
        &mut self,
        draft: super::jobs::Draft,
        source: (String, Arc<Drive>),
        to: (String, Arc<Drive>),
        extent: mirror::Extent,
        (grain, blocking): (Option<u64>, bool),
        commits: bool,
    ) -> Result<Made> {
        let (from, target) = (source.1.image(), to.1.image());
        let grain = grain.unwrap_or_else(|| Mirror::grain(&*target));
        let job = Mirror::new(from, target.clone(), extent, grain, draft.control.clone());
        let job = Arc::new(job);
        job.block_writes(blocking);
        let witness: Arc<dyn Witness> = job.clone();
        let (drive, seen, settles) = (source.1.clone(), witness.clone(), job.clone());
        let number = draft.serial;
        let finish: Finish = Box::new(move |vm: &mut Machine, replace| {
            let done = match (replace, vm.jobs.nodes_of(number)) {
                (Some(replace), Some((key, other))) => {
                    // The last changes, and then the exchange, while nobody writes.
                    if replace {
                        vm.exchange(&key, &other, || settles.settle().map_err(failed))
                    } else {
                        let _still = drive.still();
                        settles.settle().map_err(failed)
                    }
                }
                _ => Ok(()),
            };
            dismiss(&drive, &seen);
            // A base that did not become the disk is read only again.
            if commits && (replace != Some(true) || done.is_err()) {
                writes(&target, false)?;
            }
            done
        });
        let mine = job.clone();
        let work: Work = Box::new(move || {
            Ok(match mine.run() {
                Ok(end) => Outcome::Done { replace: end == End::Replace },
                Err(block::job::Halt::Failed(e)) => return Err(e),
                Err(_) => Outcome::Cancelled,
            })
        });
        let nodes = vec![source.0, to.0];
        let serial = self.create_job(draft, nodes, Some(job), work, finish);
        let arm = move || source.1.still().admit(witness);
        Ok(Made { serial, arm: Some(Box::new(arm)) })
    }

    /// The place in a chain of the image that a client means: by a node's name, its path, or what
    /// the image before it calls it.
    fn place(&self, images: &[Arc<dyn Image>], name: &str, device: &str) -> Result<usize> {
        let drives = self.drives();
        let node = self.find_node(name).ok().map(|(_, d)| d.image());
        let called = |i: usize| {
            let before = i.checked_sub(1).and_then(|b| images[b].layered());
            before.and_then(|l| l.backing_name().0)
        };
        let is_it = |i: &usize| {
            node.as_ref().is_some_and(|n| Arc::ptr_eq(n, &images[*i]))
                || images[*i].path().to_str() == Some(name)
                || called(*i).as_deref() == Some(name)
        };
        let found = (0..images.len()).find(is_it);
        found.ok_or_else(|| match drives.contains_key(name) {
            true => Error::new(format!("'{name}' is not in this backing file chain")),
            false => Error::new(format!("Can't find '{name}' in the backing chain of '{device}'")),
        })
    }

    /// `block-commit`.
    pub fn make_commit(&mut self, device: &str, layers: Layers, start: Start) -> Result<Made> {
        let source = self.find_node(device)?;
        self.must_not_change(&source.0)?;
        let images = chain(&source.1.image());
        let top = layers.top.map_or(Ok(0), |t| self.place(&images, &t, device))?;
        let base = match &layers.base {
            Some(b) => self.place(&images, b, device)?,
            None => images.len() - 1,
        };
        if base == top {
            return Err(Error::new("cannot commit an image into itself"));
        }
        if base < top {
            let name = layers.base.unwrap_or_default();
            return Err(Error::new(format!("'{name}' is not in this backing file chain")));
        }
        let (front, back) = (images[top].clone(), images[base].clone());
        if top == 0 && layers.backing_file.is_some() {
            let text = "'backing-file' specified, but 'top' is the active layer";
            return Err(Error::new(text));
        }
        let draft = self.draft_job(start.wish, start.speed, start.policy)?;
        writes(&back, true)?;
        if back.size() < front.size() {
            let grown = back.resizable().map(|r| r.resize(front.size(), Preallocation::Off));
            if let Some(Err(e)) = grown {
                let _ = back.set_writable(false);
                return Err(failed(e));
            }
        }
        if top == 0 {
            let name = self.name_image(&back)?;
            let to = self.find_node(&name)?;
            let depth = depth_above(&front, Some(&back));
            let extent = mirror::Extent::Depth(depth);
            return self.mirror_job(draft, source, to, extent, (None, false), true);
        }
        let (control, a, b) = (draft.control.clone(), front.clone(), back.clone());
        let work: Work = Box::new(move || fared(commit::run(&a, &b, &control)));
        let (above, drive, name) = (images[top - 1].clone(), source.1.clone(), layers.backing_file);
        let finish: Finish = Box::new(move |_, done| {
            let _still = drive.still();
            let closed = writes(&back, false);
            match done {
                Some(_) => closed.and(put_behind(&above, Some(&back), name.as_deref())),
                None => closed,
            }
        });
        let serial = self.create_job(draft, self.names(&source.0, &images), None, work, finish);
        Ok(Made { serial, arm: None })
    }

    /// The names of the nodes of a chain, the first of which is `key`.
    fn names(&self, key: &str, images: &[Arc<dyn Image>]) -> Vec<String> {
        let drives = self.drives();
        let behind = images.iter().skip(1).filter_map(|i| {
            drives.iter().find(|(_, d)| Arc::ptr_eq(&d.image(), i)).map(|(name, _)| name.clone())
        });
        std::iter::once(key.to_string()).chain(behind).collect()
    }

    /// `block-stream`.
    pub fn make_stream(
        &mut self,
        device: &str,
        base: Option<String>,
        backing_file: Option<String>,
        start: Start,
    ) -> Result<Made> {
        let source = self.find_node(device)?;
        self.must_not_change(&source.0)?;
        let images = chain(&source.1.image());
        let base = base.map(|b| self.place(&images, &b, device)).transpose()?;
        if base == Some(0) {
            return Err(Error::new("cannot stream an image into itself"));
        }
        if source.1.read_only() {
            return Err(Error::new(format!("Block node '{}' is read-only", source.0)));
        }
        let base = base.map(|b| images[b].clone());
        let draft = self.draft_job(start.wish, start.speed, start.policy)?;
        let top = source.1.image();
        let depth = depth_above(&top, base.as_ref());
        let job = Stream::new(top.clone(), depth, draft.control.clone());
        let witness: Arc<dyn Witness> = job.clone();
        let (drive, seen) = (source.1.clone(), witness.clone());
        let finish: Finish = Box::new(move |_, done| {
            let still = drive.still();
            still.dismiss(&seen);
            match done {
                Some(_) if top.layered().is_some() => {
                    put_behind(&top, base.as_ref(), backing_file.as_deref())
                }
                _ => Ok(()),
            }
        });
        let work: Work = Box::new(move || fared(job.run()));
        let names = self.names(&source.0, &images);
        let serial = self.create_job(draft, names, None, work, finish);
        let arm = move || source.1.still().admit(witness);
        Ok(Made { serial, arm: Some(Box::new(arm)) })
    }

    /// `blockdev-create`: `work` makes the image on a thread.
    pub fn make_image(
        &mut self,
        id: String,
        node: Option<String>,
        work: impl FnOnce() -> block::Result<()> + Send + 'static,
    ) -> Result<Made> {
        let wish = Wish { id, kind: JobType::Create, auto_finalize: true, auto_dismiss: false };
        let draft = self.draft_job(wish, 0, [OnError::Report; 2])?;
        let work: Work = Box::new(move || work().map(|()| Outcome::Done { replace: false }));
        let nodes = node.into_iter().collect();
        let serial = self.create_job(draft, nodes, None, work, Box::new(|_, _| Ok(())));
        Ok(Made { serial, arm: None })
    }
}
