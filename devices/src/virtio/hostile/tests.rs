//! Seeded cases on every device, the same in every run. `TANDEM_HOSTILE_CASES` makes it longer.

use super::subjects::{SUBJECTS, Subject};
use super::watchdog::Watchdog;
use super::{Choices, mmio, pci};

fn cases() -> u64 {
    let given = std::env::var("TANDEM_HOSTILE_CASES").ok();
    given.and_then(|n| n.parse().ok()).unwrap_or(500)
}

fn torment(name: &str) {
    let Subject { make, header, .. } = SUBJECTS.iter().find(|s| s.name == name).unwrap();
    let dog = Watchdog::new(name);
    let device = make();
    for case in 1..=cases() {
        dog.case(case);
        pci(device.clone(), *header, &mut Choices::seeded(case, 30));
        mmio(device.clone(), &mut Choices::seeded(case, 100));
    }
}

macro_rules! subjects {
    ($($test:ident $name:literal)*) => {$(
        #[test]
        fn $test() {
            torment($name);
        }
    )*
        #[test]
        fn none_is_left_out() {
            let tested = [$($name),*];
            assert!(SUBJECTS.iter().all(|s| tested.contains(&s.name)));
        }
    };
}
subjects! {
    rng "rng"
    blk "blk"
    net "net"
    console "console"
    balloon "balloon"
    p9 "9p"
    vsock "vsock"
}

#[test]
fn bytes_are_choices() {
    let mut c = Choices::bytes(&[1, 2, 3]);
    assert!(c.step());
    assert_eq!(c.below(200), 0x201 % 200);
    assert_eq!((c.word(), c.step(), c.word()), (3, false, 0));
}
