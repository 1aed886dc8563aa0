//! `tandem nbd`: exports a disk image to NBD clients, with qemu-nbd's options.
//!
//! Ends with status 0 when the last client has left (unless --persistent) or when asked to by a
//! signal, after all that was written is flushed; with 1 if it cannot serve.

use crate::cli::nbd::NbdArgs;
use crate::config::Drive as Config;
use crate::daemon::{self, Detached, Side};
use crate::img::{self, Failure};
use crate::{log, signals};
use std::process::ExitCode;
use std::sync::Arc;
use tandem_backends::block::drive::Drive;
use tandem_backends::block::{SECTOR, open};
use tandem_backends::nbd::{Export, Listener, Server};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of names and descriptions.
const MAX_STRING: usize = 4096;

/// Serves as `args` say.
pub fn run(args: &NbdArgs) -> ExitCode {
    let detached = match args.fork.then(daemon::detach).transpose() {
        Ok(Some(Side::Parent(status))) => return status.into(),
        Ok(Some(Side::Child(detached))) => detached,
        Ok(None) => Detached::not(),
        Err(e) => return fail(&Failure::usage(format!("cannot run in the background: {e}"))),
    };
    match serve(args, detached) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&e),
    }
}

fn fail(e: &Failure) -> ExitCode {
    log::error(e);
    ExitCode::FAILURE
}

fn serve(args: &NbdArgs, mut detached: Detached) -> Result<(), Failure> {
    let host = |what: &str| {
        let what = what.to_string();
        move |e: std::io::Error| Failure::usage(format!("cannot {what}: {e}"))
    };
    signals::install().map_err(host("install signal handlers"))?;
    let export = export(args)?;
    let listener = match &args.socket {
        Some(path) => {
            Listener::unix(path).map_err(host(&format!("listen at '{}'", path.display())))
        }
        None => {
            let at = (args.bind.as_str(), args.port);
            Listener::tcp(at).map_err(host(&format!("listen at {}:{}", args.bind, args.port)))
        }
    }?;
    let bell = EventFd::new(libc::EFD_CLOEXEC).map_err(host("make an event"))?;
    // Signal handlers may ring it until the process ends.
    let bell: &'static EventFd = Box::leak(Box::new(bell));
    signals::listen(bell);
    let limit = if args.shared == 0 { usize::MAX } else { args.shared };
    let ring = Box::new(|| drop(bell.write(1)));
    let server = Server::start(listener, limit, [export], ring).map_err(host("serve"))?;
    detached.ready(args.pid_file.as_deref()).map_err(host("go on in the background"))?;
    loop {
        let (now, ever) = server.clients();
        let left = now == 0 && ever > 0 && !args.persistent;
        if left || signals::asked_to_end().is_some() {
            break;
        }
        // Interrupted by a signal, which is then seen above.
        let _ = bell.read();
    }
    // Clients first, then the drive, which flushes.
    drop(server);
    if let Some(path) = &args.pid_file {
        // Somebody may have removed it.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// What is exported.
fn export(args: &NbdArgs) -> Result<Export, Failure> {
    for (what, text) in [("export name", &args.export_name), ("description", &args.description)] {
        if text.len() > MAX_STRING {
            let what = format!("the {what} has more than {MAX_STRING} bytes; shorten it");
            return Err(Failure::usage(what));
        }
    }
    let config = Config {
        file: args.file.clone(),
        format: args.format.clone(),
        readonly: args.read_only || args.load_snapshot.is_some(),
        snapshot: args.snapshot,
        cache: Some(if args.nocache { "none" } else { &args.cache }.into()),
        aio: Some(args.aio.clone()),
        discard: matches!(args.discard.as_str(), "unmap" | "on"),
        detect_zeroes: Some(args.detect_zeroes.clone()),
        ..Config::default()
    };
    let mut options = config.options();
    let spec = config.open_spec();
    let image = match &args.load_snapshot {
        Some(which) => open::open_snapshot(&spec, snapshot_name(which)),
        None if args.snapshot => {
            // Nobody reads it after a crash.
            options.cache.no_flush = true;
            open::open(&spec).and_then(open::throw_away)
        }
        None => open::open(&spec),
    }?;
    let whole = image.size();
    let offset = img::size(&args.offset)?;
    let Some(size) = whole.checked_sub(offset) else {
        let what = format!("offset {offset} lies beyond the end of the disk of {whole} bytes");
        return Err(Failure::usage(what));
    };
    if offset % SECTOR != 0 {
        let what = format!("offset {offset} is no multiple of {SECTOR} bytes");
        return Err(Failure::usage(what));
    }
    let drive: Arc<Drive> = Drive::new(image, options);
    Ok(Export {
        name: args.export_name.clone(),
        description: args.description.clone(),
        offset,
        size,
        multi_conn: args.shared != 1,
        allocation_depth: args.allocation_depth,
        ..Export::whole(drive)
    })
}

/// ID or name in qemu-nbd's forms.
fn snapshot_name(given: &str) -> &str {
    let keys = ["snapshot.id=", "snapshot.name="];
    keys.iter().find_map(|k| given.strip_prefix(k)).unwrap_or(given)
}
