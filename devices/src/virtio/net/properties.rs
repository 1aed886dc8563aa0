//! Properties of the network card, under QEMU's names.

use super::super::mmio;
use super::super::pci;
use super::{NetConfig, VirtioNet};
use crate::registry::{
    BusKind, DeviceContext, DeviceFault, DeviceType, Properties, Property, PropertyKind,
};
use std::sync::Arc;
use tandem_backends::net::{MacAddr, Offloads};

const fn property(
    name: &'static str,
    kind: PropertyKind,
    default: Option<&'static str>,
    description: &'static str,
) -> Property {
    Property { name, kind, default, description }
}

const BOOL: PropertyKind = PropertyKind::Bool;
const SIZE: PropertyKind = PropertyKind::Uint { min: 64, max: 1024 };
const ON: Option<&'static str> = Some("on");

const PROPERTIES: &[Property] = &[
    property("netdev", PropertyKind::Text, None, "ID of the network (--netdev …,id=…)"),
    property(
        "mac",
        PropertyKind::Mac,
        None,
        "Ethernet address; 52:54:00:12:34:56 and up if absent",
    ),
    property("mq", BOOL, Some("off"), "several pairs of queues"),
    property(
        "queues",
        PropertyKind::Uint { min: 1, max: NetConfig::MAX_PAIRS as u64 },
        None,
        "pairs of queues; with mq=on 4 if absent",
    ),
    property("vectors", PropertyKind::Uint { min: 0, max: 64 }, None, "accepted and ignored"),
    property("rx_queue_size", SIZE, Some("256"), "length of receive queues"),
    property("tx_queue_size", SIZE, Some("256"), "length of transmit queues"),
    property("host_mtu", PropertyKind::Uint { min: 0, max: 65535 }, Some("0"), "MTU to tell"),
    property("csum", BOOL, ON, "checksums may be left undone"),
    property("tso4", BOOL, ON, "long TCP segments over IPv4"),
    property("tso6", BOOL, ON, "long TCP segments over IPv6"),
    property("mrg_rxbuf", BOOL, ON, "frames may span buffers"),
    property("ctrl_vq", BOOL, ON, "a control queue"),
    crate::firmware::bootorder::PROPERTY,
];

impl NetConfig {
    /// Reads the properties and judges how they fit together.
    fn from_properties(p: &Properties) -> Result<NetConfig, DeviceFault> {
        let n = |name: &str| p.uint(name).unwrap_or(0);
        let size = |name: &str| match n(name) as u16 {
            s if s.is_power_of_two() => Ok(s),
            s => Err(DeviceFault::new(
                format!("{name} {s} is no power of two"),
                "use for example 256",
            )),
        };
        let control = p.bool("ctrl_vq");
        let pairs = match (p.uint("queues"), p.bool("mq")) {
            (Some(n), _) => n as u16,
            (None, true) => 4,
            (None, false) => 1,
        };
        if pairs > 1 && !control {
            return Err(DeviceFault::new(
                "several pairs of queues need a control queue",
                "remove ctrl_vq=off or mq=on",
            ));
        }
        Ok(NetConfig {
            mac: p.mac("mac").unwrap_or_else(MacAddr::next),
            pairs,
            rx_size: size("rx_queue_size")?,
            tx_size: size("tx_queue_size")?,
            mtu: n("host_mtu") as u16,
            offloads: Offloads { csum: p.bool("csum"), tso4: p.bool("tso4"), tso6: p.bool("tso6") },
            mergeable: p.bool("mrg_rxbuf"),
            control,
        })
    }
}

/// Makes a card on the network that `props` name.
fn make(ctx: &DeviceContext, props: &Properties) -> Result<Arc<VirtioNet>, DeviceFault> {
    let config = NetConfig::from_properties(props)?;
    let Some(id) = props.text("netdev") else {
        return Err(DeviceFault::new("it has no network", "name one with netdev=ID"));
    };
    let network = ctx.backends.network(id)?;
    if !network.take() {
        return Err(DeviceFault::new(
            format!("network '{id}' has a card already"),
            "give each card a network of its own",
        ));
    }
    Ok(Arc::new(VirtioNet::new(network, config)))
}

inventory::submit! {
    DeviceType {
        name: "virtio-net-pci",
        bus: BusKind::Pci,
        description: "network card",
        properties: PROPERTIES,
        create: |ctx, props| pci::attach(ctx, props, "virtio-net-pci", make(ctx, props)?),
    }
}

inventory::submit! {
    DeviceType {
        name: "virtio-net-device",
        bus: BusKind::VirtioMmio,
        description: "network card",
        properties: PROPERTIES,
        create: |ctx, props| mmio::attach(ctx, make(ctx, props)?),
    }
}
