//! An input as a row of choices.

/// Bytes that are taken one after the other. Past their end every choice is 0.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// Takes from these bytes.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether nothing is left to choose by.
    pub const fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.array())
    }

    /// A number around 0.
    pub fn offset(&mut self) -> i64 {
        i8::from_be_bytes(self.array()).into()
    }

    /// One byte says how many follow.
    pub fn bytes(&mut self) -> &'a [u8] {
        let length = usize::from(self.byte()).min(self.0.len());
        self.take(length)
    }

    pub fn pick<'t, T>(&mut self, among: &'t [T]) -> &'t T {
        &among[usize::from(self.byte()) % among.len()]
    }

    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let taken = self.take(N.min(self.0.len()));
        bytes[..taken.len()].copy_from_slice(taken);
        bytes
    }

    /// What was not chosen by.
    pub const fn rest(self) -> &'a [u8] {
        self.0
    }

    fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken
    }
}
