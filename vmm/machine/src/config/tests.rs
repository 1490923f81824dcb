//! Tables for the description of a machine: what parses, what is refused and in which words.

use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::host::{HostFacts, HugePages, KernelMode, KvmFacts, Paging, SystemFacts, Virtualization};

fn host() -> HostFacts {
    HostFacts {
        system: SystemFacts {
            cpus: 4,
            virtualization: Virtualization::VtX,
            nested: false,
            avx: true,
            memory_total: ByteSize::mib(8192),
            memory_available: ByteSize::mib(4096),
            huge_pages: HugePages::default(),
            modules: Vec::new(),
            paging: Paging::Ept,
            tun: true,
        },
        kvm: KvmFacts { api_version: 12, max_vcpus: 1024, kernel_mode: KernelMode::Hardware },
    }
}

fn parse(text: &str) -> Result<MachineConfig, String> {
    MachineConfig::from_json(Path::new("vm.json"), text.as_bytes()).map_err(|e| e.to_string())
}

fn with(change: impl FnOnce(&mut MachineConfig)) -> MachineConfig {
    let mut config = MachineConfig::default();
    config.boot.kernel = "bzImage".into();
    change(&mut config);
    config
}

fn net(tap: &str) -> NetConfig {
    NetConfig { tap: Some(tap.into()), mac: None, address: None, gateway: None }
}

#[test]
fn every_slot_has_a_line_of_its_own() {
    let lines: Vec<u8> = (0..).map_while(irq_for_slot).collect();
    assert_eq!(lines, [5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]);
    assert_eq!(irq_for_slot(MAX_DEVICES), None);
}

#[test]
fn sizes_are_read_as_people_write_them() {
    for (text, bytes) in [
        ("0", 0),
        ("4096", 4096),
        ("512B", 512),
        ("64k", 64 << 10),
        ("256M", 256 << 20),
        ("64MiB", 64 << 20),
        ("64mb", 64 << 20),
        ("1G", 1 << 30),
        ("2T", 2 << 40),
        ("18446744073709551615", u64::MAX),
    ] {
        assert_eq!(text.parse(), Ok(ByteSize::new(bytes)), "{text}");
    }
    for text in [
        "",
        "M",
        "-1",
        "1.5G",
        "1,5G",
        " 1G",
        "1 G",
        "1X",
        "1Mi",
        "1MBB",
        "1KiBi",
        "18446744073709551616",
        "16777216T",
    ] {
        assert!(text.parse::<ByteSize>().is_err(), "{text:?}");
    }
    assert_eq!(ByteSize::new(1536 << 20).to_string(), "1536M");
    assert_eq!(ByteSize::new(1025).to_string(), "1025");
}

#[test]
fn addresses_are_read_and_printed() {
    for text in ["02:00:5e:10:00:01", "ff:ff:ff:ff:ff:ff"] {
        assert_eq!(text.parse::<MacAddress>().unwrap().to_string(), text);
    }
    for text in [
        "",
        "02:00:5e:10:00",
        "02:00:5e:10:00:01:02",
        "2:0:5e:10:0:1",
        "02-00-5e-10-00-01",
        "02:00:5e:10:00:+1",
        "é2:00:5e:10:00:1",
    ] {
        assert!(text.parse::<MacAddress>().is_err(), "{text:?}");
    }
    let local = MacAddress::local([0xff; 6]);
    assert_eq!(local.to_string(), "fe:ff:ff:ff:ff:ff");
    assert!(local.is_unicast() && MacAddress::local([0; 6]).is_unicast());
    assert!(!MacAddress::new([0; 6]).is_unicast() && !MacAddress::new([1, 0, 0, 0, 0, 0]).is_unicast());

    let cidr: Ipv4Cidr = "10.1.2.3/23".parse().unwrap();
    assert_eq!(
        (cidr.to_string().as_str(), cidr.netmask().to_string().as_str()),
        ("10.1.2.3/23", "255.255.254.0")
    );
    assert!(cidr.reaches([10, 1, 3, 1].into()));
    assert!(!cidr.reaches([10, 1, 4, 1].into()) && !cidr.reaches([10, 1, 2, 3].into()));
    assert_eq!("1.2.3.4/0".parse::<Ipv4Cidr>().unwrap().netmask().to_bits(), 0);
    for text in
        ["", "10.0.0.1", "10.0.0.1/", "10.0.0.1/33", "10.0.0.1/+8", "10.0.0/8", "::1/64", "10.0.0.1/8/8"]
    {
        assert!(text.parse::<Ipv4Cidr>().is_err(), "{text:?}");
    }
}

#[test]
fn a_whole_description_is_read() {
    let config = parse(
        r#"{
            "vcpus": 2,
            "memory": { "size": "512MiB" },
            "boot": { "kernel": "vmlinux", "initramfs": { "file": "i.cpio" }, "cmdline": "debug", "protocol": "pvh" },
            "devices": [
                { "block": { "path": "ctr.img", "read_only": true } },
                { "block": { "path": "data.img" } },
                { "net": { "tap": "tap0", "mac": "02:00:00:00:00:01", "address": "10.0.0.2/24", "gateway": "10.0.0.1" } },
                { "vsock": { "cid": 42, "uds_path": "/run/vm.sock" } },
                { "rng": {} }
            ],
            "console": { "file": "console.log" }
        }"#,
    )
    .unwrap();
    assert_eq!((config.vcpus, config.memory.size), (2, ByteSize::mib(512)));
    assert_eq!(config.boot.initramfs, Initramfs::File("i.cpio".into()));
    assert_eq!(config.boot.protocol, BootProtocol::Pvh);
    assert_eq!(config.console, ConsoleConfig::File("console.log".into()));
    assert_eq!(config.devices.len(), 5);
    config.validate(&host()).unwrap();

    let again = serde_json::to_string(&config).unwrap();
    assert_eq!(parse(&again).unwrap(), config);

    let least =
        parse(r#"{ "boot": { "kernel": "k", "initramfs": "none" }, "memory": { "size": 67108864 } }"#)
            .unwrap();
    assert_eq!((least.vcpus, least.memory.size), (1, ByteSize::mib(64)));
    assert_eq!(parse("{}").unwrap(), MachineConfig::default());
}

#[test]
fn a_bad_description_is_named_with_its_place() {
    for (text, message) in [
        (
            "{\n  \"vcpu\": 2\n}",
            "vm.json:2:8: unknown field `vcpu`, expected one of `vcpus`, `memory`, `boot`, `devices`, `console`",
        ),
        ("{\"devices\":[{\"rng\":{\"x\":1}}]}", "vm.json:1:23: unknown field `x`, there are no fields"),
        (
            "{\"devices\":[\n{\"block\":{\"path\":\"a\",\n\"ro\":true}}]}",
            "vm.json:3:4: unknown field `ro`, expected `path` or `read_only`",
        ),
        (
            "{\"devices\":[{\"gpu\":{}}]}",
            "vm.json:1:18: unknown variant `gpu`, expected one of `block`, `net`, `vsock`, `rng`",
        ),
        ("{\"memory\":{\"size\":\"lots\"}}", "\"lots\" is not a size"),
        ("{\"memory\":{\"size\":-1}}", "expected a size such as \"256M\", or a number of bytes"),
        ("{\"vcpus\":10000}", "expected u8"),
        ("{\"vcpus\":1,\"vcpus\":1}", "duplicate field `vcpus`"),
        ("", "vm.json:1:0: EOF while parsing a value"),
        ("{} {}", "trailing characters"),
    ] {
        let error = parse(text).unwrap_err();
        assert!(error.contains(message) && !error.contains('\n'), "{text:?}: {error}");
    }
    let error = MachineConfig::load(Path::new("/nowhere/vm.json")).unwrap_err().to_string();
    assert_eq!(
        error,
        "cannot read the configuration \"/nowhere/vm.json\": No such file or directory (os error 2)"
    );
}

#[test]
fn what_cannot_be_is_refused_in_one_line() {
    let block = || DeviceConfig::Block(BlockConfig { path: Some("d".into()), read_only: false });
    let table = [
        (MachineConfig::default(), "no kernel given"),
        (with(|c| c.vcpus = 0), "0 vCPUs: choose 1 to 64"),
        (with(|c| c.vcpus = 65), "65 vCPUs: choose 1 to 64"),
        (
            with(|c| c.memory.size = ByteSize::mib(31)),
            "31M of memory is too little: give the guest 32M or more",
        ),
        (with(|c| c.memory.size = ByteSize::new((64 << 20) + 4096)), "not a multiple of 1M"),
        (
            with(|c| c.memory.size = ByteSize::mib(8193)),
            "8193M of memory is more than this host has (8192 MiB, 4096 MiB of it available now): give the guest less",
        ),
        (with(|c| c.boot.cmdline = "x".repeat(1025)), "boot.cmdline is 1025 bytes long"),
        (with(|c| c.boot.cmdline = "a\nb".into()), "the byte 0x0a at 1"),
        (with(|c| c.devices = vec![block(); 19]), "19 devices: a machine has interrupt lines for 18"),
        (with(|c| c.devices = vec![DeviceConfig::Rng(RngConfig {}); 2]), "devices[1]: a second rng"),
        (
            with(|c| c.devices = vec![DeviceConfig::Vsock(VsockConfig::default()); 2]),
            "devices[1]: a second vsock",
        ),
        (
            with(|c| c.devices = vec![DeviceConfig::Vsock(VsockConfig { cid: 2, uds_path: None })]),
            "cid 2 is reserved",
        ),
        (
            with(|c| c.devices = vec![DeviceConfig::Vsock(VsockConfig { cid: u32::MAX, uds_path: None })]),
            "is reserved",
        ),
        (
            with(|c| {
                c.devices = vec![DeviceConfig::Block(BlockConfig { path: Some("".into()), read_only: true })]
            }),
            "empty path",
        ),
        (
            with(|c| c.devices = vec![DeviceConfig::Net(net("t")); 2]),
            "devices[1]: the TAP \"t\" is used twice",
        ),
    ];
    for (config, message) in table {
        let error = config.validate(&host()).unwrap_err().to_string();
        assert!(error.contains(message) && !error.contains('\n'), "{error}");
    }
    for name in ["", ".", "..", "a/b", "a b", "tap%d", "a:1", "sixteen-letters-", "tåp"] {
        let config = with(|c| c.devices.push(DeviceConfig::Net(net(name))));
        assert!(matches!(config.validate(&host()), Err(ConfigError::TapName { at: 0, .. })), "{name:?}");
    }
    let mut small = host();
    small.kvm.max_vcpus = 8;
    let error = with(|c| c.vcpus = 9).validate(&small).unwrap_err().to_string();
    assert_eq!(error, "9 vCPUs: choose 1 to 8, which is this host's limit");
}

#[test]
fn a_network_card_is_checked() {
    let card = |change: fn(&mut NetConfig)| {
        let mut net = net("tap0");
        change(&mut net);
        with(|c| c.devices.push(DeviceConfig::Net(net))).validate(&host())
    };
    assert!(card(|_| ()).is_ok());
    assert!(matches!(card(|n| n.mac = Some(MacAddress::new([1; 6]))), Err(ConfigError::Mac { .. })));
    assert!(matches!(
        card(|n| n.gateway = Some([10, 0, 0, 1].into())),
        Err(ConfigError::GatewayAlone { .. })
    ));
    let outside = card(|n| {
        n.address = "10.0.0.2/24".parse().ok();
        n.gateway = Some([10, 0, 1, 1].into());
    });
    assert_eq!(
        outside.unwrap_err().to_string(),
        "devices[0]: the gateway 10.0.1.1 is not another host of 10.0.0.2/24's network"
    );
    let mac = Some(MacAddress::new([2; 6]));
    let twice =
        with(|c| c.devices.extend(["a", "b"].map(|t| DeviceConfig::Net(NetConfig { mac, ..net(t) }))));
    assert!(matches!(twice.validate(&host()), Err(ConfigError::MacTwice { at: 1, .. })));
}

proptest! {
    #[test]
    fn a_size_reads_back_what_it_prints(bytes: u64, shift in 0_u32..64) {
        let size = ByteSize::new(bytes >> shift << shift);
        prop_assert_eq!(size.to_string().parse(), Ok(size));
    }

    #[test]
    fn no_text_makes_the_parsers_panic(text in ".{0,40}") {
        let _ = text.parse::<ByteSize>();
        let _ = text.parse::<MacAddress>();
        let _ = text.parse::<Ipv4Cidr>();
        let _ = MachineConfig::from_json(Path::new("x"), text.as_bytes());
    }
}
