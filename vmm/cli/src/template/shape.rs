//! What of a machine is decided when its guest boots, and so is the same for all copies of a template. Pure.
//!
//! A driver reads some things once, when it finds its device: whether a disk is read-only, that there is a network card at all. So a
//! template has *classes* of slots: the root (read-only), writable disks, read-only disks, a card. Slots of a template are spare: no
//! medium, no TAP. Machines with few disks share a template, since it has some more than it needs.

use machine::config::{
    BlockConfig, BootProtocol, ConsoleConfig, DeviceConfig, Initramfs, MacAddress, MachineConfig, NetConfig,
    RngConfig, VsockConfig,
};

/// Spare disks of a class come in these numbers.
const STEPS: [usize; 4] = [0, 2, 4, 8];

/// A spare card has an address too; whoever plugs it in has the agent change it.
const SPARE_MAC: MacAddress = MacAddress::new([0x02, 0, 0, 0, 0, 1]);

/// A machine as the copy of a template.
#[derive(Debug, Clone, PartialEq)]
pub struct Fitted {
    /// The template's machine: all slots spare.
    pub template: MachineConfig,
    /// The machine, its devices in the template's slots.
    pub machine: MachineConfig,
    /// For each of the machine's disks after the root, in the order in which it was described: its letter in the template.
    pub disks: Vec<char>,
}

/// Fits `config`, whose first device is the container's root, into a template. `None` when it has something that a template cannot
/// give it: then it boots.
pub fn fit(config: &MachineConfig) -> Option<Fitted> {
    let boots_by_itself =
        config.boot.initramfs != Initramfs::BuiltIn || config.boot.protocol != BootProtocol::Auto;
    // Who wants to read the kernel's messages wants to see it boot.
    if boots_by_itself || config.console != ConsoleConfig::None || config.memory.track_dirty {
        return None;
    }
    let (root, rest) = config.devices.split_first()?;
    let DeviceConfig::Block(BlockConfig { path: Some(_), read_only: true }) = root else { return None };
    let (mut writable, mut readable, mut cards) = (Vec::new(), Vec::new(), Vec::new());
    let mut vsock = None;
    let mut order = Vec::new();
    for device in rest {
        match device {
            DeviceConfig::Block(block) => {
                let class = if block.read_only { &mut readable } else { &mut writable };
                order.push((block.read_only, class.len()));
                class.push(block.clone());
            }
            DeviceConfig::Net(net) => cards.push(net.clone()),
            DeviceConfig::Vsock(found) => vsock = Some(found.clone()),
            DeviceConfig::Rng(_) => {}
        }
    }
    let vsock = vsock?;
    if cards.len() > 1 {
        return None;
    }
    let writable_slots = step(writable.len())?;
    let readable_slots = step(readable.len())?;
    let spare = |read_only| DeviceConfig::Block(BlockConfig { path: None, read_only });
    let fill = |used: &[BlockConfig], slots: usize, read_only| {
        let used = used.iter().cloned().map(DeviceConfig::Block);
        used.chain(std::iter::repeat_n(spare(read_only), slots)).take(slots).collect::<Vec<_>>()
    };
    let mut machine = MachineConfig { devices: vec![root.clone()], ..config.clone() };
    machine.devices.extend(fill(&writable, writable_slots, false));
    machine.devices.extend(fill(&readable, readable_slots, true));
    machine.devices.extend(cards.iter().cloned().map(DeviceConfig::Net));
    machine.devices.push(DeviceConfig::Vsock(vsock.clone()));
    machine.devices.push(DeviceConfig::Rng(RngConfig {}));

    let mut template = machine.clone();
    for device in &mut template.devices {
        match device {
            DeviceConfig::Block(block) => block.path = None,
            DeviceConfig::Net(net) => {
                *net = NetConfig { tap: None, mac: Some(SPARE_MAC), address: None, gateway: None }
            }
            DeviceConfig::Vsock(vsock) => vsock.uds_path = None,
            DeviceConfig::Rng(_) => {}
        }
    }
    let first = |read_only| if read_only { 1 + writable_slots } else { 1 };
    let letter = |(read_only, at): (bool, usize)| letter(first(read_only) + at);
    let disks = order.into_iter().map(letter).collect();
    // Without a uds path the address has no meaning outside of the machine: one for all.
    if let Some(DeviceConfig::Vsock(VsockConfig { cid, .. })) = template.devices.iter().rev().nth(1)
        && *cid != VsockConfig::default_cid()
    {
        return None;
    }
    Some(Fitted { template, machine, disks })
}

/// How many slots there are for `used` disks of a class.
fn step(used: usize) -> Option<usize> {
    STEPS.into_iter().find(|slots| *slots >= used)
}

/// The last letter of the name of a block device.
fn letter(index: usize) -> char {
    u8::try_from(index).ok().and_then(|index| b'a'.checked_add(index)).map_or('?', char::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(path: &str, read_only: bool) -> DeviceConfig {
        DeviceConfig::Block(BlockConfig { path: Some(path.into()), read_only })
    }

    fn machine(devices: Vec<DeviceConfig>) -> MachineConfig {
        let mut config = MachineConfig { devices, ..MachineConfig::default() };
        config.devices.push(DeviceConfig::Vsock(VsockConfig::default()));
        config.devices.push(DeviceConfig::Rng(RngConfig {}));
        config
    }

    fn paths(config: &MachineConfig) -> Vec<(Option<String>, bool)> {
        let blocks = config.devices.iter().filter_map(|device| match device {
            DeviceConfig::Block(b) => Some((b.path.as_ref().map(|p| p.display().to_string()), b.read_only)),
            _ => None,
        });
        blocks.collect()
    }

    #[test]
    fn machines_with_few_disks_share_a_template() {
        let plain = fit(&machine(vec![disk("root", true)])).unwrap();
        assert_eq!(paths(&plain.template), [(None, true)]);
        assert!(plain.disks.is_empty());
        let one = fit(&machine(vec![disk("root", true), disk("a", false)])).unwrap();
        let two = fit(&machine(vec![disk("other", true), disk("x", false), disk("y", false)])).unwrap();
        assert_eq!(one.template, two.template);
        assert_ne!(one.template, plain.template);
        assert_eq!((one.disks, two.disks), (vec!['b'], vec!['b', 'c']));
    }

    #[test]
    fn disks_go_into_slots_of_their_class_and_keep_their_order_by_name() {
        let disks = vec![disk("root", true), disk("r", true), disk("w", false), disk("s", true)];
        let fitted = fit(&machine(disks)).unwrap();
        let some = |path: &str| Some(path.to_string());
        assert_eq!(
            paths(&fitted.machine),
            [(some("root"), true), (some("w"), false), (None, false), (some("r"), true), (some("s"), true)]
        );
        assert_eq!(fitted.disks, ['d', 'b', 'e']);
        assert_eq!(fitted.template.devices.len(), fitted.machine.devices.len());
    }

    #[test]
    fn a_card_is_unplugged_in_the_template() {
        let net = NetConfig {
            tap: Some("tap0".into()),
            mac: None,
            address: Some("10.0.0.2/24".parse().unwrap()),
            gateway: None,
        };
        let fitted = fit(&machine(vec![disk("root", true), DeviceConfig::Net(net.clone())])).unwrap();
        assert!(fitted.machine.devices.contains(&DeviceConfig::Net(net)));
        let spare = NetConfig { tap: None, mac: Some(SPARE_MAC), address: None, gateway: None };
        assert!(fitted.template.devices.contains(&DeviceConfig::Net(spare)));
    }

    #[test]
    fn some_machines_boot() {
        let root = || vec![disk("root", true)];
        assert_eq!(fit(&MachineConfig { console: ConsoleConfig::Stderr, ..machine(root()) }), None);
        let mut own = machine(root());
        own.boot.initramfs = Initramfs::None;
        assert_eq!(fit(&own), None);
        assert_eq!(fit(&machine(vec![disk("root", false)])), None);
        let many = std::iter::repeat_with(|| disk("x", false)).take(9);
        assert_eq!(fit(&machine(root().into_iter().chain(many).collect())), None);
        assert_eq!(fit(&MachineConfig::default()), None);
    }
}
