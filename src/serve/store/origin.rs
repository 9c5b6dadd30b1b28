//! Which file a store is at home in. In any other it is a copy, from a backup say, which may have forgotten what was accepted
//! after it was made.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::UNIX_EPOCH;

/// A file, told from all others: no tool makes another one that is the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Origin([u8; 24]);

impl Origin {
    /// Of an open file.
    ///
    /// # Errors
    /// The kernel's.
    pub fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        // The number of a file that is deleted may be the next one's, which was born later.
        let born = metadata.created().ok().and_then(|born| born.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        let mut bytes = [0; 24];
        let parts = metadata.ino().to_be_bytes().into_iter().chain(born.as_nanos().to_be_bytes());
        bytes.iter_mut().zip(parts).for_each(|(to, from)| *to = from);
        Ok(Self(bytes))
    }

    pub(super) const fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io;
    use std::os::fd::AsRawFd;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::super::{Origin, Store, StoreFloor, Suspicion};
    use crate::crypto::PrivateKey;
    use crate::verify::Floor;

    fn memory() -> File {
        memfd_create("store", MemfdFlags::CLOEXEC).unwrap().into()
    }

    #[test]
    fn a_copy_takes_no_counter_up_to_the_given_one_from_then_on_and_its_floor_is_never_lowered() {
        let server = *PrivateKey::generate().unwrap().public();
        let home = memory();
        Store::create(home.try_clone().unwrap(), &server, StoreFloor { floor: 10, since: 0 }).unwrap();
        let elsewhere = memory();
        io::copy(&mut File::open(format!("/proc/self/fd/{}", home.as_raw_fd())).unwrap(), &mut &elsewhere).unwrap();

        let floor = |file: &File, since| {
            let origin = Origin::of(file).unwrap();
            let mut store =
                Store::open(file.try_clone().unwrap(), server, origin, StoreFloor { floor: since, since }).unwrap();
            let is_copy = store.doubt() == Some(Suspicion::Copy);
            (is_copy, store.floor().unwrap())
        };
        assert_eq!(
            Store::check(elsewhere.try_clone().unwrap(), &server).unwrap().0,
            Some(Suspicion::Copy),
            "and stays one"
        );
        assert_eq!(floor(&home, 20), (false, Floor::new(10)));
        assert_eq!(floor(&elsewhere, 20), (true, Floor::new(20)));
        assert_eq!(floor(&elsewhere, 30), (false, Floor::new(20)), "at home now");
        let third = memory();
        io::copy(&mut File::open(format!("/proc/self/fd/{}", elsewhere.as_raw_fd())).unwrap(), &mut &third).unwrap();
        assert_eq!(floor(&third, 15), (true, Floor::new(20)));
    }
}
