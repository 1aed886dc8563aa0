//! Registers of the 82574L (Intel 82574 GbE Controller Family datasheet, revision 3.4, §10.2) and
//! their bits.

/// Device control.
pub const CTRL: u64 = 0x0000;
/// Device status.
pub const STATUS: u64 = 0x0008;
/// EEPROM control.
pub const EECD: u64 = 0x0010;
/// EEPROM read.
pub const EERD: u64 = 0x0014;
/// MDI control: the PHY's registers.
pub const MDIC: u64 = 0x0020;
/// Ethernet type of VLAN tags.
pub const VET: u64 = 0x0038;
/// Interrupt causes; reading clears.
pub const ICR: u64 = 0x00c0;
/// Sets causes.
pub const ICS: u64 = 0x00c8;
/// Interrupt mask; writing sets bits.
pub const IMS: u64 = 0x00d0;
/// Clears bits of the mask.
pub const IMC: u64 = 0x00d8;
/// Causes that a message clears by itself.
pub const EIAC: u64 = 0x00dc;
/// Bits of the mask that reading the causes clears.
pub const IAM: u64 = 0x00e0;
/// Which cause sends which message.
pub const IVAR: u64 = 0x00e4;
/// Extended device control.
pub const CTRL_EXT: u64 = 0x0018;
/// Receive control.
pub const RCTL: u64 = 0x0100;
/// Transmit control.
pub const TCTL: u64 = 0x0400;
/// State of the management engine's start.
pub const EEMNGCTL: u64 = 0x1010;
/// Sizes of buffers when packets are split.
pub const PSRCTL: u64 = 0x2170;
/// Receive ring: base, high base, length, head, tail.
pub const RDBAL: u64 = 0x2800;
/// As above.
pub const RDBAH: u64 = 0x2804;
/// As above.
pub const RDLEN: u64 = 0x2808;
/// As above.
pub const RDH: u64 = 0x2810;
/// As above.
pub const RDT: u64 = 0x2818;
/// Transmit ring: base, high base, length, head, tail.
pub const TDBAL: u64 = 0x3800;
/// As above.
pub const TDBAH: u64 = 0x3804;
/// As above.
pub const TDLEN: u64 = 0x3808;
/// As above.
pub const TDH: u64 = 0x3810;
/// As above.
pub const TDT: u64 = 0x3818;
/// Statistics: first and end; reading clears.
pub const STATISTICS: std::ops::Range<u64> = 0x4000..0x4128;
/// Good packets received, octets of them (64 bits), and the same transmitted.
pub const GPRC: u64 = 0x4074;
/// As above.
pub const GPTC: u64 = 0x4080;
/// As above.
pub const GORC: u64 = 0x4088;
/// As above.
pub const GOTC: u64 = 0x4090;
/// Receive checksums.
pub const RXCSUM: u64 = 0x5000;
/// Receive filter control.
pub const RFCTL: u64 = 0x5008;
/// Multicast table, 128 words.
pub const MTA: u64 = 0x5200;
/// Receive addresses, 16 pairs of words.
pub const RA: u64 = 0x5400;
/// Table of VLANs, 128 words.
pub const VFTA: u64 = 0x5600;
/// Length of all.
pub const LEN: u64 = 0x2_0000;

/// CTRL: no more requests to memory.
pub const CTRL_MASTER_DISABLE: u32 = 1 << 2;
/// CTRL: the link is set up.
pub const CTRL_LINK: u32 = 1 << 6;
/// CTRL: reset; of the PHY.
pub const CTRL_RESET: u32 = 1 << 26;
/// As above.
pub const CTRL_PHY_RESET: u32 = 1 << 31;
/// CTRL: VLAN tags are taken out of frames.
pub const CTRL_VLAN: u32 = 1 << 30;
/// STATUS: full duplex, link up, 1000 Mbit/s.
pub const STATUS_LINK: u32 = 1 | 1 << 1 | 2 << 6;
/// STATUS: requests to memory are made.
pub const STATUS_MASTER: u32 = 1 << 19;
/// EECD: software asks for the EEPROM, and has it; it is there, and has been read.
pub const EECD_REQUEST: u32 = 1 << 6;
/// As above.
pub const EECD_GRANT: u32 = 1 << 7;
/// As above.
pub const EECD_PRESENT: u32 = 1 << 8 | 1 << 9;
/// CTRL_EXT: reading the causes masks them; messages mask theirs.
pub const CTRL_EXT_IAME: u32 = 1 << 27;
/// As above.
pub const CTRL_EXT_EIAME: u32 = 1 << 24;
/// EEMNGCTL: done.
pub const EEMNGCTL_DONE: u32 = 3 << 18;
/// RCTL: on; all unicast, all multicast, long packets, broadcast.
pub const RCTL_ON: u32 = 1 << 1;
/// As above.
pub const RCTL_UNICAST: u32 = 1 << 3;
/// As above.
pub const RCTL_MULTICAST: u32 = 1 << 4;
/// As above.
pub const RCTL_LONG: u32 = 1 << 5;
/// As above.
pub const RCTL_BROADCAST: u32 = 1 << 15;
/// RCTL: packets are split over several buffers.
pub const RCTL_SPLIT: u32 = 1 << 10;
/// RCTL: VLANs are looked up in the table.
pub const RCTL_VLAN_FILTER: u32 = 1 << 18;
/// RCTL: sizes of buffers are sixteen times as large.
pub const RCTL_LARGE: u32 = 1 << 25;
/// RCTL: the check sequence is left out.
pub const RCTL_STRIP: u32 = 1 << 26;
/// RFCTL: extended descriptors.
pub const RFCTL_EXTENDED: u32 = 1 << 15;
/// RXCSUM: of IP, of TCP and UDP.
pub const RXCSUM_IP: u32 = 1 << 8;
/// As above.
pub const RXCSUM_TCP: u32 = 1 << 9;
/// TCTL: on; short packets are padded.
pub const TCTL_ON: u32 = 1 << 1;
/// As above.
pub const TCTL_PAD: u32 = 1 << 3;
/// RAH: the address counts.
pub const RAH_VALID: u32 = 1 << 31;

/// Causes: a descriptor was written back; the transmit ring is empty; the link changed; the receive
/// ring is short, has overrun; a packet has come; queue 0 of either kind; something else.
pub mod cause {
    /// A transmit descriptor was written back.
    pub const TXDW: u32 = 1;
    /// The transmit ring is empty.
    pub const TXQE: u32 = 1 << 1;
    /// The link changed.
    pub const LSC: u32 = 1 << 2;
    /// The receive ring is short.
    pub const RXDMT: u32 = 1 << 4;
    /// A packet found no room.
    pub const RXO: u32 = 1 << 6;
    /// A packet has come.
    pub const RXT: u32 = 1 << 7;
    /// Receive queue 0.
    pub const RXQ0: u32 = 1 << 20;
    /// Receive queue 1.
    pub const RXQ1: u32 = 1 << 21;
    /// Transmit queue 0.
    pub const TXQ0: u32 = 1 << 22;
    /// Transmit queue 1.
    pub const TXQ1: u32 = 1 << 23;
    /// Something else.
    pub const OTHER: u32 = 1 << 24;
    /// What counts as something else.
    pub const OTHERS: u32 = LSC | RXO;
    /// The interrupt is asserted.
    pub const ASSERTED: u32 = 1 << 31;
}
