# The least guest there is: write 'R' to the first serial port, then reset the machine through the keyboard controller,
# or, assembled with -DHALT, stop for good. Start-up figures are taken with it. One source, two entries: with -DLONG64
# for the 64-bit entry of the Linux boot protocol, else for PVH's 32-bit entry, named by a Xen ELF note of type 18.

#ifdef LONG64
.code64
#else
.section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .long _start
.code32
#endif

.section .text.start, "ax"
.globl _start
_start:
    mov $0x3f8, %edx
    mov $'R', %al
    out %al, %dx
#ifndef HALT
    mov $0x64, %edx
    mov $0xfe, %al
    out %al, %dx
#endif
1:  hlt
    jmp 1b

.section .note.GNU-stack, "", @progbits
