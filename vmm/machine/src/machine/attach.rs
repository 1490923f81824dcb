//! Changing what a device is the front of, while its guest lives.

use devices::virtio::block::Medium as BlockMedium;
use devices::virtio::device::Backend;
use devices::virtio::transport::AttachFailed;

use super::Attached;
use crate::config::DeviceConfig;
use crate::control::{AttachBackend, Refusal};
use crate::host::tap;
use crate::snapshot::disks::LiveDisk;

/// Gives the device in `slot` another back end, and notes that in its description.
pub(super) fn change(
    device: &mut Attached,
    config: &mut DeviceConfig,
    slot: usize,
    backend: AttachBackend,
) -> Result<(), Refusal> {
    let refused = |e: AttachFailed| Refusal::Invalid(format!("slot {slot}: {e}"));
    match (backend, config) {
        (AttachBackend::Disk { file, read_only }, DeviceConfig::Block(block)) => {
            if block.read_only != read_only {
                let (slot_is, disk) =
                    if read_only { ("writable", "read-only") } else { ("read-only", "writable") };
                return Err(Refusal::Invalid(format!(
                    "slot {slot} was made {slot_is}, which its driver relies on: it takes no {disk} disk"
                )));
            }
            let twice =
                file.try_clone().map_err(|e| Refusal::Failed(format!("cannot open the disk twice: {e}")))?;
            device.transport.attach(Backend::Disk(BlockMedium::Raw(file))).map_err(refused)?;
            let path = path_of(&twice);
            device.backend = Some(path.as_ref().map_or("unnamed".into(), |path| path.display().to_string()));
            block.path.clone_from(&path);
            device.disk =
                Some(LiveDisk { slot, path, read_only, medium: BlockMedium::Raw(twice), base: None });
            Ok(())
        }
        (AttachBackend::Tap(tap), DeviceConfig::Net(net)) => {
            let name = tap::name(&tap);
            device.transport.attach(Backend::Tap(tap)).map_err(refused)?;
            device.backend = Some(name.clone().unwrap_or_else(|| "TAP given by descriptor".into()));
            // A snapshot names the TAP that the machine has, and not the one that it had.
            net.tap = name;
            Ok(())
        }
        (AttachBackend::Disk { .. }, _) => Err(Refusal::Invalid(format!("slot {slot} is no disk's"))),
        (AttachBackend::Tap(_), _) => Err(Refusal::Invalid(format!("slot {slot} is no network card's"))),
    }
}

/// Where a file that came as a descriptor has its name, if it still has one.
fn path_of(file: &std::fs::File) -> Option<std::path::PathBuf> {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;
    let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
    let (named, open) = (std::fs::metadata(&path).ok()?, file.metadata().ok()?);
    (named.dev() == open.dev() && named.ino() == open.ino()).then_some(path)
}
